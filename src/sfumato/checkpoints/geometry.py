"""Network configs derived from the names and shapes of weights, in either naming."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from sfumato.families import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sfumato.checkpoints.headers import Stored

__all__ = ["blocks_config", "levels", "text_config", "unet_config", "vae_config", "widths_config"]

Tensors = "Mapping[str, Stored]"
_BLOCK = re.compile(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.(.+)")
_OURS = re.compile(r"(down_blocks|mid_block|up_blocks)(?:\.(\d+))?\.(resnets|attentions)\.(\d+)\.(.+)")
_DEPTH = re.compile(r"transformer_blocks\.(\d+)\.")
_ENCODED = re.compile(r"encoder\.down(?:_blocks)?\.(\d+)\.(?:block|resnets)\.(\d+)\.conv2\.weight")
_READ = re.compile(r"(?:layers|resblocks)\.(\d+)\.mlp\.(?:fc1|c_fc)\.weight$")


class _Layer:
    """A residual block: its width, its transformer's depth, and whether that attends only to the prompt."""

    def __init__(self) -> None:
        self.width = self.depth = 0
        self.only_cross = False
        self.halves = False

    def see(self, name: str, stored: Stored) -> None:
        if name.endswith(("out_layers.3.weight", "conv2.weight")):
            self.width = stored.shape[0]
        elif name.endswith("op.weight"):
            self.halves = True
        elif found := _DEPTH.search(name):
            self.depth = max(self.depth, int(found[1]) + 1)
            if name.endswith("attn1.to_k.weight"):
                self.only_cross |= stored.shape[0] != stored.shape[1]


Way = list[list[_Layer]]


def unet_config(tensors: Mapping[str, Stored]) -> dict[str, Any]:
    """Return the config keys that follow from the shapes of a U-Net's tensors, given without their prefix."""
    if "time_proj.weight" in tensors:  # only the latent upscaler stores Fourier frequencies
        return dict(FAMILIES["x2-upscaler"].unet)
    first = "conv_in" if "conv_in.weight" in tensors else "input_blocks.0.0"
    down, middle, up = levels(tensors)
    width, channels = tensors[f"{first}.weight"].shape[:2]
    config: dict[str, Any] = {"in_channels": channels}
    config |= blocks_config(down, middle, up)
    config["block_out_channels"] = tuple(level[0].width for level in down) or (width,)
    config |= widths_config(tensors)
    for name in ("time_embedding.cond_proj.weight", "time_embed.cond_proj.weight"):
        if name in tensors:
            config["time_cond_proj_dim"] = tensors[name].shape[1]
    return config


def levels(tensors: Mapping[str, Stored]) -> tuple[Way, list[_Layer], Way]:
    """Return a U-Net's residual blocks: levels of the down path, the middle, and levels of the up path."""
    return _ours(tensors) if "conv_in.weight" in tensors else _original(tensors)


def _original(tensors: Mapping[str, Stored]) -> tuple[Way, list[_Layer], Way]:
    """Return the same for the original layout, which numbers blocks consecutively."""
    found: dict[tuple[str, int], _Layer] = defaultdict(_Layer)
    for name, stored in tensors.items():
        if match := _BLOCK.match(name):
            found[match[1], int(match[2])].see(match[3], stored)
    down: Way = [[]]
    for index in range(1, 1 + sum(side == "input_blocks" for side, _ in found)):
        layer = found.get(("input_blocks", index), _Layer())
        if layer.halves:
            down.append([])
        elif layer.width:
            down[-1].append(layer)
    middle = [found[side, index] for side, index in sorted(found) if side == "middle_block"]
    rest = [found[side, index] for side, index in sorted(found) if side == "output_blocks"]
    up: Way = []
    for level in reversed(down):
        count = len(level) + 1
        up, rest = [*up, rest[:count]], rest[count:]
    return [level for level in down if level], middle, up


def _ours(tensors: Mapping[str, Stored]) -> tuple[Way, list[_Layer], Way]:
    found: dict[tuple[str, int, int], _Layer] = defaultdict(_Layer)
    for name, stored in tensors.items():
        if match := _OURS.match(name):
            found[match[1], int(match[2] or 0), int(match[4])].see(match[5], stored)
    levels: dict[str, dict[int, list[_Layer]]] = defaultdict(lambda: defaultdict(list))
    for side, level, layer in sorted(found):
        levels[side][level].append(found[side, level, layer])
    middle = levels["mid_block"][0]
    return list(levels["down_blocks"].values()), middle, list(levels["up_blocks"].values())


def blocks_config(down: Way, middle: Sequence[_Layer], up: Way) -> dict[str, Any]:
    """Return block types, layer counts and transformer depths, spelled as in published configs."""
    crossed = [any(layer.depth for layer in level) for level in down]
    deep = max((layer.depth for layer in middle), default=0)
    # Levels without attention are written as depth 1, except the last, whose depth is that of the middle block.
    idle = [1] * (len(down) - 1) + [deep or 1]
    ways = [
        [tuple(layer.depth for layer in level) if crossed[i] else idle[i] for i, level in enumerate(way[: len(down)])]
        for way in (down, list(reversed(up)))
    ]
    config: dict[str, Any] = {
        "down_block_types": tuple("CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in crossed),
        "up_block_types": tuple("CrossAttnUpBlock2D" if cross else "UpBlock2D" for cross in reversed(crossed)),
        "mid_block_type": ("UNetMidBlock2DCrossAttn" if deep else "UNetMidBlock2D") if middle else None,
        "layers_per_block": _one(tuple(len(level) for level in down)),
    }
    plain = [[_one(value) for value in way] for way in ways]
    if plain[0] == plain[1]:
        shown = [value for value, cross in zip(plain[0], crossed, strict=True) if cross] + ([deep] if deep else [])
        config["transformer_layers_per_block"] = shown[0] if len(set(shown)) == 1 else tuple(plain[0])
    else:
        config["transformer_layers_per_block"] = tuple(ways[0])
        config["reverse_transformer_layers_per_block"] = tuple(reversed(ways[1]))
    only = tuple(any(layer.only_cross for layer in level) for level in down)
    return config | ({"only_cross_attention": only} if any(only) else {})


def _one(values: Any) -> Any:
    """Collapse a tuple of equal values to a single one."""
    return values[0] if isinstance(values, tuple) and len(set(values)) == 1 else values


def widths_config(tensors: Mapping[str, Stored]) -> dict[str, Any]:
    """Return the prompt width and the projection type from the first transformer, and the extra embedding's keys."""
    context = next((stored.shape[1] for name, stored in tensors.items() if name.endswith(".attn2.to_k.weight")), None)
    entry = next((stored for name, stored in tensors.items() if name.endswith(".proj_in.weight")), None)
    found = {} if context is None else {"cross_attention_dim": context}
    found |= {"use_linear_projection": True} if entry is not None and len(entry.shape) == 2 else {}
    return found | _labels(tensors, context)


def _labels(tensors: Mapping[str, Stored], context: int | None) -> dict[str, Any]:
    """Return the keys of the embedding added to the timestep: pooled prompt and sizes, an image, or class labels."""
    for name in ("label_emb.weight", "class_embedding.weight"):
        if name in tensors:
            return {"num_class_embeds": tensors[name].shape[0]}
    for name in ("add_embedding", "class_embedding", "label_emb.0"):
        first = tensors.get(f"{name}.linear_1.weight") or tensors.get(f"{name}.0.weight")
        if first is None:
            continue
        given = {"projection_class_embeddings_input_dim": first.shape[1]}
        if name == "class_embedding" or (name == "label_emb.0" and context == 1024):
            return given | {"class_embed_type": "projection"}
        return given | {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
    return {}


def vae_config(tensors: Mapping[str, Stored]) -> dict[str, Any]:
    """Return the same for an autoencoder; empty if only its config can describe its shape."""
    layers = {
        (int(match[1]), int(match[2])): stored.shape[0]
        for name, stored in tensors.items()
        if (match := _ENCODED.fullmatch(name))
    }
    levels = sorted({level for level, _ in layers})
    if not levels or any(width % 32 for width in layers.values()):
        return {}
    return {
        "block_out_channels": tuple(layers[level, 0] for level in levels),
        "down_block_types": ("DownEncoderBlock2D",) * len(levels),
        "up_block_types": ("UpDecoderBlock2D",) * len(levels),
        "layers_per_block": 1 + max(layer for _, layer in layers),
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
    }


def text_config(tensors: Mapping[str, Stored], usual: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same for a text encoder. usual: the family's config. Heads are 64 wide."""
    ends = {name.removesuffix(".weight").rpartition(".")[2]: stored for name, stored in tensors.items()}
    words, positions = ends.get("token_embedding"), ends.get("position_embedding") or ends.get("positional_embedding")
    layers = {int(match[1]): stored.shape[0] for name, stored in tensors.items() if (match := _READ.search(name))}
    if words is None or positions is None or not layers or words.shape[1] % 64:
        return {}
    width, count = words.shape[1], 1 + max(layers)
    config = {"vocab_size": words.shape[0], "hidden_size": width, "max_position_embeddings": positions.shape[0]}
    # Some families skip the last layer, but their files contain it.
    last = usual["num_hidden_layers"]
    config |= {"num_hidden_layers": last if count == last + 1 else count, "intermediate_size": layers[0]}
    projection = tensors.get("text_projection")
    if projection is not None and usual["projection_dim"] == usual["hidden_size"]:
        config["projection_dim"] = projection.shape[1]
    return config | {"num_attention_heads": width // 64}
