"""The model that comes with the package is a checkpoint like any other: the reference reads it and draws the same."""

from __future__ import annotations

import diffusers
import numpy as np
import torch

import sfumato
from sfumato.checkpoints.builtin import builtin_model
from support.compare import generator

PROMPT = "a red apple, 3d"


def test_the_reference_draws_the_same_picture():
    ours = sfumato.StableDiffusionPipeline.from_pretrained(builtin_model())
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(builtin_model(), torch_dtype=torch.float32)
    pictures = []
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
        call = {"num_inference_steps": 20, "guidance_scale": 3.0, "output_type": "np"}
        pictures.append(pipe(PROMPT, generator=generator(7), **call).images[0])
    assert pictures[0].shape == (128, 128, 3)
    assert np.abs(pictures[0] - pictures[1]).max() <= 2 / 255


def test_the_package_stays_small_and_says_where_its_art_is_from():
    folder = builtin_model()
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 30_000_000
    notice = (folder / "NOTICE").read_text(encoding="utf-8")
    for licence in ("MIT", "Apache-2.0", "CC-BY-4.0"):
        assert licence in notice
