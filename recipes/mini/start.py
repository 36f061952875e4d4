"""Go on from the weights that ship with the package, where WORK has none of its own and their shapes are the same.

The VAE counts as trained. The text encoder and the U-Net begin their schedule anew, from these weights instead of none.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from common import Log, arguments, need, save
from export import CALM, loud_layers
from models import build_text, build_unet, build_vae, text_config, unet_config, vae_config
from optim import Optimiser
from safetensors.torch import load_file
from state import State
from torch import nn
from train import Pair

from sfumato.checkpoints.builtin import FOLDER


def fits(row: SimpleNamespace, work: Path, vocabulary: int) -> bool:
    """Whether the shipped folder has this budget's networks and reads the same tokens."""
    configs = {
        "vae": vae_config(row),
        "text_encoder": text_config(row, vocabulary),
        "unet": unet_config(row),
    }
    for part, wanted in configs.items():
        path = FOLDER / part / "config.json"
        if not path.is_file() or not wanted.items() <= json.loads(path.read_text()).items():
            return False
    return all(
        (FOLDER / "tokenizer" / name).read_text() == (work / "tokenizer" / name).read_text()
        for name in ("merges.txt", "vocab.json")
    )


def shipped(network: nn.Module, part: str, file: str) -> nn.Module:
    """The network with its shipped weights."""
    weights = {name: value.float() for name, value in load_file(FOLDER / part / file).items()}
    loud = loud_layers(weights) if part == "unet" else ()  # `export` has made these smaller, and will again
    network.load_state_dict({k: v * CALM if k.rsplit(".", 1)[0] in loud else v for k, v in weights.items()})
    return network


def main() -> None:
    _, row, work = arguments(__doc__)
    log = Log(work / "start.log")
    vocabulary = json.loads(need(work / "captions.json", "captions.py").read_text())["vocabulary"]
    if (work / "vae.pt").exists():
        log("start: WORK has a VAE of its own")
    elif not fits(row, work, vocabulary):
        log("start: the shipped weights have another shape or vocabulary; training begins at nothing")
    else:
        pair = Pair(
            shipped(build_text(row, vocabulary), "text_encoder", "model.safetensors"),
            shipped(build_unet(row), "unet", "diffusion_pytorch_model.safetensors"),
        )
        State(work / "train.pt", pair, Optimiser(pair, row.muon), row.average).keep()
        vae = shipped(build_vae(row), "vae", "diffusion_pytorch_model.safetensors")
        state = State(work / "vae.pt", vae, Optimiser(vae, row.muon), 0.998)
        state.step, state.clock.spent = max(row.vae_images // row.vae_batch, 1), row.vae_seconds
        state.keep()
        save(work / "vae_final.pt", {"model": vae.state_dict()})  # its latents are folded already: relatives can begin
        log("start: begins at the shipped weights")


if __name__ == "__main__":
    main()
