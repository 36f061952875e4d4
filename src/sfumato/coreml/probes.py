"""Test inputs for converted networks, as a real run would produce them, and the source's outputs."""

from __future__ import annotations

from math import ceil, prod
from typing import TYPE_CHECKING, Any

import torch

from sfumato.coreml.roles import INPUTS
from sfumato.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from sfumato.coreml.program import Interface
    from sfumato.coreml.source import Source
    from sfumato.models.base import Model

__all__ = ["PROMPT", "Probe", "answer", "embeddings", "probes"]

Probe = dict[str, torch.Tensor]

PROMPT = "a red apple, 3d"
# From early to late in a run of a model trained on 1000 timesteps, where the sines differ most between precisions.
# The timesteps of a batch differ, so that swapped rows are detected.
TIMESTEPS = (981.0, 1.0, 481.0, 721.0)
SEED = 0


def probes(part: str, interface: Interface, source: Source) -> list[Probe]:
    """Return inputs for one part, with its interface's names and shapes; on the CPU, the same for every call.

    Floating-point values are exact in float16, so that rounding inputs is not part of the comparison; token ids are
    integers. Raises `CheckpointError` if the interface is not that of such a part.
    """
    return [
        {name: x.half().float() if x.is_floating_point() else x for name, x in probe.items()}
        for probe in _probes(part, interface, source)
    ]


@torch.no_grad()
def answer(part: str, network: Model, probe: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the outputs of a source network for a probe, under the names of Core ML's outputs."""
    net: Any = network
    probe = {name: x.to(network.dtype) if x.is_floating_point() else x for name, x in probe.items()}
    if part == "text_encoder":
        last, pooled = net(probe["input_ids"], return_dict=False)
        return {"last_hidden_state": last, "pooled_outputs": pooled}
    if part == "unet":
        states = probe["encoder_hidden_states"].squeeze(2).transpose(1, 2)
        return {"noise_pred": net(probe["sample"], probe["timestep"], states, return_dict=False)[0]}
    if part == "vae_decoder":
        return {"image": net.decode(probe["z"], return_dict=False)[0]}
    return {"latent": net.encode(probe["x"], return_dict=False)[0].parameters}


def embeddings(texts: tuple[str, ...], length: int, source: Source) -> Tensor:
    """Return the source text encoder's embeddings of texts: (B, length, C), float32."""
    encoder = source.load("text_encoder", torch.float32)
    ids = source.tokenizer.fitted(texts, length).input_ids
    return answer("text_encoder", encoder, {"input_ids": ids})["last_hidden_state"]


def _tokens(text: str, shape: tuple[int, int], source: Source) -> Tensor:
    """Return token ids (1, S), integers."""
    return source.tokenizer.fitted([text], shape[1]).input_ids


def _states(shape: tuple[int, int, int, int], source: Source) -> Tensor:
    """Return embeddings in the U-Net package's layout, (B, C, 1, S): of a prompt and, for guidance, of an empty one."""
    batch, width, _, length = shape
    own = source.sizes.text_encoder_config.hidden_size
    if width != own:
        raise CheckpointError(
            f"the U-Net needs embeddings with {width} values, but {source.name} gives {own}; use the right checkpoint"
        )
    return embeddings((("", PROMPT) * batch)[-batch:], length, source).transpose(1, 2)[:, :, None]


def _picture(shape: tuple[int, int, int, int]) -> Tensor:
    """Return a smooth image in [-1, 1] that contains an edge, like photographs."""
    height, width = shape[2:]
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    disc = torch.where(x**2 + y**2 < 0.5, 0.5, -0.5)
    channels = [(x * 3).sin() * 0.5 + disc * 0.8, (y * 2).cos() * 0.9 - disc * 0.4, x * y * 0.8]
    return torch.stack(channels[: shape[1]]).clamp(-1, 1)[None].repeat(shape[0], 1, 1, 1)


def _probes(part: str, interface: Interface, source: Source) -> list[Probe]:
    sides = {feature.name: feature.type.shape for feature in interface.inputs}
    wanted = INPUTS[part]
    if sides.keys() != wanted or any(side is None for shape in sides.values() for side in shape):
        raise CheckpointError(
            f"the {part} has inputs {', '.join(sorted(sides))}; only {', '.join(sorted(wanted))} can be verified"
        )
    shapes: Any = sides
    generator = torch.Generator().manual_seed(SEED)
    if part == "text_encoder":
        return [{"input_ids": _tokens(text, shapes["input_ids"], source)} for text in (PROMPT, "")]
    if part == "unet":
        states = _states(shapes["encoder_hidden_states"], source)
        rows = prod(shapes["timestep"])
        count = ceil(len(TIMESTEPS) / rows)
        times = torch.tensor(TIMESTEPS * rows)[: count * rows].reshape(count, *shapes["timestep"])
        samples = torch.randn((count, *shapes["sample"]), generator=generator)
        return [
            {"sample": sample, "timestep": time, "encoder_hidden_states": states}
            for sample, time in zip(samples, times, strict=True)
        ]
    if part == "vae_decoder":
        scale = source.sizes.vae_config.scaling_factor
        return [{"z": torch.randn(shapes["z"], generator=generator) / scale}]
    return [{"x": _picture(shapes["x"])}]
