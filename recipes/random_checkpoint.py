"""Write a Stable Diffusion checkpoint with random weights: real layout, real architecture, small or full size.

For demonstrations without a trained model, for tests and for benchmarks, where the time of a picture does not depend on
what the weights have learned. Its pictures are noise.

    python recipes/random_checkpoint.py FOLDER [--size tiny|sd15|sd21] [--dtype float32]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from sfumato import (
    AutoencoderKL,
    CLIPTextModel,
    CLIPTokenizer,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from sfumato.runtime.device import DTYPES

SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "skip_prk_steps": True}
TEXT: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 514,
    },
    "sd15": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "sd21": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
    },
}
UNET: dict[str, dict[str, Any]] = {
    "tiny": {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
    },
    "sd15": {"sample_size": 64, "cross_attention_dim": 768},
    "sd21": {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
}
FULL_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
TINY_VAE = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "sample_size": 32,
}
VAE: dict[str, dict[str, Any]] = {"tiny": TINY_VAE, "sd15": FULL_VAE, "sd21": FULL_VAE | {"sample_size": 768}}


def build(folder: Path, size: str = "tiny", dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Write the checkpoint of this size into the folder, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer(folder / "tokenizer")
    # fork_rng: the caller's random numbers stay its own.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text = CLIPTextModel(**TEXT[size], bos_token_id=512, eos_token_id=513, pad_token_id=513).to(dtype)
        unet = UNet2DConditionModel(**UNET[size]).to(dtype)
        vae = AutoencoderKL(**VAE[size]).to(dtype)
    prediction = "v_prediction" if size == "sd21" else "epsilon"
    scheduler = PNDMScheduler(**SCHEDULER, prediction_type=prediction, steps_offset=1, set_alpha_to_one=False)
    parts = {"vae": vae, "text_encoder": text, "tokenizer": tokenizer, "unet": unet, "scheduler": scheduler}
    StableDiffusionPipeline(**parts).save_pretrained(folder)
    return folder


def byte_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer with no merges: every byte is a token of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    config = {"model_max_length": 77, "pad_token": "<|endoftext|>", "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return CLIPTokenizer.from_folder(folder)


def main() -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=sorted(UNET), default="tiny")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    arguments = parser.parse_args()
    print(build(arguments.folder, arguments.size, DTYPES[arguments.dtype]))


if __name__ == "__main__":
    main()
