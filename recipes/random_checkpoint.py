"""Write a Stable Diffusion checkpoint with random weights: real layout, real architecture, small or full size.

For demonstrations without a trained model, for tests and for benchmarks, where the time of a picture does not depend on
what the weights have learned. Its pictures are noise.

    python recipes/random_checkpoint.py FOLDER [--size tiny|sd15|sdxl|…] [--dtype float32]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import sfumato
from sfumato import AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, UNet2DConditionModel
from sfumato.families import FAMILIES, Family
from sfumato.pipelines.parts import Parts
from sfumato.runtime.device import DTYPES
from sfumato.schedulers.base import Scheduler

# The smallest one of Stable Diffusion's shape; the others are as their families were published.
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 514}
TINY = replace(
    FAMILIES["sd15"],
    name="tiny",
    encoders=(replace(FAMILIES["sd15"].encoders[0], config=TEXT),),
    unet={
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
    },
    vae={
        "block_out_channels": (32, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "sample_size": 32,
    },
)
SIZES = {"tiny": TINY} | {name: row for name, row in FAMILIES.items() if hasattr(sfumato, row.pipeline)}


def build(folder: Path, size: str = "tiny", dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Write a checkpoint of this size into the folder, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    row = SIZES[size]
    parts = parts_of(folder, row, dtype, seed)
    pipeline = getattr(sfumato, row.pipeline)
    flags = Parts(**parts, family=row).flags
    pipeline(**parts, **{name: flags[name] for name in pipeline.index.flags if name in flags}).save_pretrained(folder)
    return folder


def parts_of(folder: Path, row: Family, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
    """Return a pipeline's parts, with random weights made on the device. Only tokenizers are written to the folder."""
    parts: dict[str, Any] = {"scheduler": scheduler(row)}
    # The caller's random numbers and precision stay its own. Half precision is made as such: the float32 numbers of the
    # largest networks alone would be three times as large as what is written.
    before = torch.get_default_dtype()
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            for encoder in row.encoders:
                name = encoder.role.replace("text_encoder", "tokenizer")
                words = encoder.config.get("vocab_size", 49408)
                ids = {"bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": words - 1}
                kind = CLIPTextModelWithProjection if encoder.projected else CLIPTextModel
                parts[name] = pair_tokenizer(folder / name, words, encoder.pad)
                parts[encoder.role] = kind(**encoder.config | ids)
            parts["unet"], parts["vae"] = UNet2DConditionModel(**row.unet), AutoencoderKL(**row.vae)
        finally:
            torch.set_default_dtype(before)
    return parts


def scheduler(row: Family) -> Scheduler:
    """Return the scheduler of a family."""
    return getattr(sfumato, row.scheduler["_class_name"]).from_config(row.scheduler)


def pair_tokenizer(folder: Path, words: int = 514, pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """Return CLIP's tokenizer with this many tokens: bytes, start, end, and pairs of bytes (letters last)."""
    folder.mkdir(parents=True, exist_ok=True)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    ends = [letter + "</w>" for letter in letters]
    pairs = [(a, b) for a in reversed(letters) for b in reversed(ends + letters)]
    merges = pairs[len(pairs) - (words - 514) :]
    vocabulary = [*letters, *ends, *(a + b for a, b in merges), "<|startoftext|>", "<|endoftext|>"]
    text = json.dumps({word: i for i, word in enumerate(vocabulary)}, ensure_ascii=False)
    (folder / "vocab.json").write_text(text, encoding="utf-8")
    lines = "".join(f"{a} {b}\n" for a, b in merges)
    (folder / "merges.txt").write_text("#version: 0.2\n" + lines, encoding="utf-8")
    config = {"model_max_length": 77, "pad_token": pad, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return CLIPTokenizer.from_folder(folder)


def main() -> None:
    """Parse the command line and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    arguments = parser.parse_args()
    print(build(arguments.folder, arguments.size, DTYPES[arguments.dtype]))


if __name__ == "__main__":
    main()
