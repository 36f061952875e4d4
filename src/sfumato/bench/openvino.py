"""OpenVINO on the same weights: our networks, converted and compiled for the CPU."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sfumato.bench.inputs import TIMESTEP, call_inputs
from sfumato.models import AutoencoderKL, UNet2DConditionModel

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sfumato.bench.cases import Case

__all__ = ["call"]

# OpenVINO's names of the dtypes.
HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


class _UNet(nn.Module):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.model = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")

    def forward(
        self, x: Tensor, t: Tensor, embeds: Tensor, pooled: Tensor | None = None, sizes: Tensor | None = None
    ) -> Tensor:
        added = None if pooled is None else {"text_embeds": pooled, "time_ids": sizes}
        return self.model(x, t, embeds, added_cond_kwargs=added, return_dict=False)[0]


class _Decoder(nn.Module):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.model = AutoencoderKL.from_pretrained(folder, subfolder="vae")

    def forward(self, z: Tensor) -> Tensor:
        return self.model.decode(z, return_dict=False)[0]


def call(case: Case, folder: Path, converted: Path) -> Callable[[], Tensor]:
    """Return a function that calls the U-Net with a batch of two, or the VAE's decoder.

    converted: folder for the network in OpenVINO's format, which is written if missing.
    """
    import openvino

    given = call_inputs(case, folder)
    pair = torch.cat([given.latents, given.latents])
    told = (pair, torch.tensor(TIMESTEP), given.embeds, *given.added.values())
    inputs = (given.latents,) if case.work == "vae" else told
    path = converted / f"{case.work}-{case.size}.xml"
    if not path.is_file():
        _convert(openvino, case.work, folder, inputs, path)
    options = {"INFERENCE_PRECISION_HINT": HINTS[case.dtype], "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = openvino.Core().compile_model(path, "CPU", options | {"PERFORMANCE_HINT": "LATENCY"})
    arrays = [x.numpy() for x in inputs]
    return lambda: torch.from_numpy(request(arrays)[0])


@torch.no_grad()
def _convert(openvino: Any, work: str, folder: Path, inputs: tuple[Tensor, ...], path: Path) -> None:
    module = (_UNet(folder) if work == "unet" else _Decoder(folder)).eval()
    shapes = [list(x.shape) for x in inputs]
    model = openvino.convert_model(module, example_input=inputs, input=shapes)
    path.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(model, path, compress_to_fp16=False)
    del model, module
    gc.collect()
