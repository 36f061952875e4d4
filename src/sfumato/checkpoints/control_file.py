"""Single-file control networks: their kind and config, derived from the header alone."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sfumato.checkpoints.detect import Detected, FilePart, kind_of
from sfumato.checkpoints.geometry import blocks_config, levels, widths_config
from sfumato.checkpoints.rules import Names, unet_names
from sfumato.checkpoints.single_file import SingleFile, file_header
from sfumato.configs import ControlNetConfig, T2IAdapterConfig, parse
from sfumato.errors import CheckpointError
from sfumato.families import FAMILIES, find

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from os import PathLike

    from torch import Tensor

    from sfumato.checkpoints.headers import Header, Stored

__all__ = ["adapter_names", "control_class", "control_config", "control_names", "open_control_file"]

# A weight that every T2I-Adapter has, under our name and the original one, and one of a light adapter.
ADAPTER = {"ours": "adapter.body.0.resnets.0.block1.weight", "original": "body.0.block1.weight"}
LIGHT = "body.0.body.0.block1.weight"
# A weight that every ControlNet has, under our name and the original one, and the prefixes it may have.
CONTROLNET = {"ours": "controlnet_cond_embedding.conv_in.weight", "original": "input_hint_block.0.weight"}
# The layers that encode the control image, under both names.
_HINT = re.compile(r"(controlnet_cond_embedding\.(conv_in|blocks\.\d+|conv_out)|input_hint_block\.\d+)\.weight$")
PREFIXES = ("", "control_model.", "controlnet.")


def open_control_file(
    name: str | PathLike[str] | Mapping[str, Tensor], *, use_safetensors: bool | None = None, **hub: Any
) -> SingleFile:
    """Find a single-file ControlNet or T2I-Adapter and detect its config, without reading any weights.

    name: a path, a hub id followed by a file name, a hub URL, or a dict of tensors. use_safetensors=False permits
    pickled files. Raises `CheckpointError` if the file is something else, and says what.
    """
    header = file_header(name, use_safetensors, hub)
    for prefix in PREFIXES:
        for naming, first in CONTROLNET.items():
            if prefix + first in header.tensors:
                return SingleFile(header.path, header, _controlnet(header, prefix, naming))
    for naming, first in (*ADAPTER.items(), ("original", LIGHT)):
        if first in header.tensors:
            return SingleFile(header.path, header, _adapter(header, naming))
    raise CheckpointError(f"{header.path} is {_instead(header)}, not a ControlNet; give a file with a ControlNet")


def control_class(file: SingleFile) -> str:
    """Return the class name for the network in a file."""
    if "t2i_adapter" in file.detected.parts:
        return "T2IAdapter"
    return "ControlNetUnionModel" if "num_control_type" in file.config("controlnet") else "ControlNetModel"


def control_config(tensors: Mapping[str, Stored]) -> dict[str, Any]:
    """Return the config keys that follow from tensor shapes, for the encoder and the control image embedding."""
    down, middle, _ = levels(tensors)
    up = [[*level, level[-1]] for level in reversed(down)]
    config: dict[str, Any] = blocks_config(down, middle, up) | {
        "block_out_channels": tuple(level[0].width for level in down)
    }
    config["in_channels"] = tensors[
        "conv_in.weight" if "conv_in.weight" in tensors else "input_blocks.0.0.weight"
    ].shape[1]
    config |= widths_config(tensors)
    hint = [stored.shape for name, stored in tensors.items() if _HINT.match(name) and len(stored.shape) == 4]
    widths = sorted(shape[0] for shape in hint)[:-1]  # the last layer's width belongs to the U-Net
    config["conditioning_channels"] = min(shape[1] for shape in hint)
    # Every width but the largest appears twice: in a layer that keeps the width, then in one that increases it.
    config["conditioning_embedding_out_channels"] = (*widths[:-1:2], widths[-1])
    if (tasks := tensors.get("task_embedding")) is not None:  # a ControlNet Union
        kinds, channels = tasks.shape
        config |= {"num_control_type": kinds, "num_trans_channel": channels}
        config["num_trans_layer"] = _count(tensors, r"transformer_layes\.(\d+)\.")
        config["num_proj_channel"] = tensors["spatial_ch_projs.weight"].shape[0]
    return config


def _count(tensors: Iterable[str], pattern: str) -> int:
    """Return one more than the largest number that a pattern's group matches in the names."""
    return 1 + max(int(found[1]) for name in tensors if (found := re.match(pattern, name)))


def control_names(config: ControlNetConfig) -> tuple[Names, ...]:
    """Return the name mapping for a ControlNet with this config."""
    last = 2 * len(config.conditioning_embedding_out_channels) - 2
    hint = ["conv_in", *(f"blocks.{i}" for i in range(last)), "conv_out"]
    pairs = [(f"^input_hint_block.{2 * i}.", f"^controlnet_cond_embedding.{one}.") for i, one in enumerate(hint)]
    pairs += [("^zero_convs.#.0.", "^controlnet_down_blocks.#."), ("^middle_block_out.0.", "^controlnet_mid_block.")]
    return (*(Names(*pair) for pair in pairs), *unet_names(config.unet))


def _controlnet(header: Header, prefix: str, naming: str) -> Detected:
    own = {name.removeprefix(prefix): one for name, one in header.tensors.items() if name.startswith(prefix)}
    if "difference" in header.tensors:
        raise CheckpointError(
            f"{header.path} is the difference between a ControlNet and its U-Net; get the ControlNet itself"
        )
    try:
        config = control_config(own)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise CheckpointError(f"{header.path}: its ControlNet has an unknown shape ({error})") from error
    family = next(iter(find(config)), None)
    if family is None:
        raise CheckpointError(
            f"{header.path}: its ControlNet has {config['in_channels']} input channels, unlike any known family"
        )
    heads, widths = family.unet.get("attention_head_dim", 8), config["block_out_channels"]
    if not isinstance(heads, int) and widths != family.unet["block_out_channels"]:
        heads = tuple(max(1, width // 64) for width in widths)
    told = {"attention_head_dim": heads, "upcast_attention": family.unet.get("upcast_attention") or False}
    config = {key: value for key, value in config.items() if "up_block" not in key and "reverse" not in key} | told
    reason = f"a ControlNet for {family.title}: width {widths[0]}, prompt width {config.get('cross_attention_dim')}"
    names = control_names(parse(ControlNetConfig, config, header.path)[0]) if naming == "original" else ()
    part = replace(_part(own, prefix, naming, config), names=names)
    return Detected(family=family, parts={"controlnet": part}, scheduler={}, steps=0, reasons=(reason,))


def adapter_names(config: T2IAdapterConfig) -> tuple[Names, ...]:
    """Return the name mapping for a T2I-Adapter. Except in light ones, all residual blocks are numbered in sequence."""
    pairs = [("^conv_in.", "^adapter.conv_in.")]
    if config.adapter_type == "light_adapter":
        pairs += [(f"^body.#.{name}.", f"^adapter.body.#.{name}.") for name in ("in_conv", "out_conv")]
        return tuple(Names(*pair) for pair in [*pairs, ("^body.#.body.#.", "^adapter.body.#.resnets.#.")])
    for i, j in itertools.product(range(len(config.blocks)), range(config.num_res_blocks)):
        number, ours = i * config.num_res_blocks + j, f"^adapter.body.{i}"
        pairs += [(f"^body.{number}.in_conv.", f"{ours}.in_conv.")] if not j else []
        pairs.append((f"^body.{number}.block#.", f"{ours}.resnets.{j}.block#."))
    return tuple(Names(*pair) for pair in pairs)


def _adapter(header: Header, naming: str) -> Detected:
    """Detect a T2I-Adapter. The pixels per feature show where it downsamples its input: 16 in adapters for XL."""
    start = "adapter." if naming == "ours" else ""
    own = {name.removeprefix(start): one.shape for name, one in header.tensors.items()}
    light = "conv_in.weight" not in own
    read = own["body.0.in_conv.weight" if light else "conv_in.weight"][1]
    colours = 1 if math.isqrt(read) ** 2 == read else 3
    factor = math.isqrt(read // colours)
    through = naming == "original" and not light  # residual blocks are numbered in sequence, two per block
    per_block = 2 if through else _count(own, r"body\.0\.(?:resnets|body)\.(\d+)\.")
    blocks = _count(own, r"body\.(\d+)\.") // (2 if through else 1)
    inner = "out_conv" if light else "block1" if through else "resnets.0.block1"
    widths = [own[f"body.{i * (2 if through else 1)}.{inner}.weight"][0] for i in range(blocks - light)]
    config = {
        "in_channels": colours, "channels": widths, "num_res_blocks": per_block, "downscale_factor": factor,
        "adapter_type": "light_adapter" if light else "full_adapter_xl" if factor == 16 else "full_adapter",
    }  # fmt: skip
    names = adapter_names(parse(T2IAdapterConfig, config, header.path)[0]) if naming == "original" else ()
    part = replace(_part(header.tensors, "", naming, config), names=names)
    family = FAMILIES["sdxl" if factor == 16 else "sd15"]
    reason = f"a T2I-Adapter: {len(widths)} widths, {factor} pixels to one"
    return Detected(family=family, parts={"t2i_adapter": part}, scheduler={}, steps=0, reasons=(reason,))


def _part(own: Mapping[str, Stored], prefix: str, naming: str, config: Mapping[str, Any]) -> FilePart:
    sizes: dict[str, int] = {}
    for stored in own.values():
        sizes[stored.dtype] = sizes.get(stored.dtype, 0) + stored.bytes
    dtype = max(sizes, key=lambda name: sizes[name])
    return FilePart(prefix, naming, config, sum(one.count for one in own.values()), sum(sizes.values()), dtype)


def _instead(header: Header) -> str:
    whole = ("output_blocks.0.0.in_layers.0.weight", "up_blocks.0.resnets.0.norm1.weight")
    return "a checkpoint" if any(name.endswith(whole) for name in header.tensors) else kind_of(header.tensors)
