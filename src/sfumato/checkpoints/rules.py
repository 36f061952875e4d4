"""Weight names in the original layout (CompVis and Stability single files) and in ours, as data.

Each `Names` maps in both directions: # stands for a number, ^ and $ for the beginning and the end. If several match a
name, all are applied: first to last towards our names, last to first towards the original ones.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sfumato.configs import UNet2DConditionConfig

__all__ = ["OPEN_CLIP", "Names", "Rule", "names_for", "original_name", "respelled", "unet_names", "vae_names"]


@dataclass(frozen=True)
class Rule:
    """A regular expression that renames keys of another layout; an empty replacement drops the key."""

    pattern: str
    replacement: str


@dataclass(frozen=True)
class Names:
    """A name in the original layout and in ours. `form` is how the original tensor differs from ours.

    "same"; "matrix": a 1×1 convolution; "transposed"; "thirds": q, k and v concatenated, which our name spells with *.
    """

    original: str
    ours: str
    form: str = "same"

    def rule(self, *, back: bool = False) -> Rule:
        """Return the renaming rule towards our name, or towards the original one if `back`."""
        begin, end = (self.ours, self.original) if back else (self.original, self.ours)
        pattern = re.escape(begin).replace(r"\^", "^").replace(r"\$", "$").replace(r"\#", r"(\d+)")
        numbers = iter(range(1, 10))
        replacement = re.sub("#", lambda _: rf"\g<{next(numbers)}>", end.strip("^$"))
        return Rule(pattern.replace(r"\*", "[qkv]"), replacement)


@cache
def _back(names: Names) -> tuple[re.Pattern[str], str]:
    rule = names.rule(back=True)
    return re.compile(rule.pattern), rule.replacement


def original_name(key: str, names: Sequence[Names]) -> tuple[str, str, int]:
    """Return the original name and form of one of our weights, and its index among q, k and v."""
    part = re.search(r"\.([qkv])_proj\.", key)
    form = "same"
    for one in reversed(names):
        pattern, replacement = _back(one)
        key, found = pattern.subn(replacement, key)
        form = one.form if found and one.form != "same" else form
    return key, form, "qkv".index(part[1]) if part and form == "thirds" else 0


# Alternative spellings of original names, and their form.
_RESPELLED = (
    (re.compile(r"^time_embed\."), "time_embedding.", None),
    (re.compile(r"^text_projection$"), "text_projection.weight", "same"),
    (re.compile(r"^text_model\."), "", None),  # from merges of the first year
    # Autoencoders of the first years, saved by diffusers.
    (re.compile(r"(mid_block\.attentions\.\d+)\.to_q\."), r"\1.query.", "matrix"),
    (re.compile(r"(mid_block\.attentions\.\d+)\.to_k\."), r"\1.key.", "matrix"),
    (re.compile(r"(mid_block\.attentions\.\d+)\.to_v\."), r"\1.value.", "matrix"),
    (re.compile(r"(mid_block\.attentions\.\d+)\.to_out\.0\."), r"\1.proj_attn.", "matrix"),
)


def respelled(name: str, form: str) -> list[tuple[str, str]]:
    """Return the known spellings of an original name, each with its form, the usual one first."""
    other = [(pattern.sub(to, name), new or form) for pattern, to, new in _RESPELLED if pattern.search(name)]
    return [(name, form), *other]


# The mapping inside every residual block of the U-Net.
_RESNET = tuple(
    Names(f"resnets.#.{original}.", f"resnets.#.{ours}.")
    for original, ours in (
        ("in_layers.0", "norm1"),
        ("in_layers.2", "conv1"),
        ("emb_layers.1", "time_emb_proj"),
        ("out_layers.0", "norm2"),
        ("out_layers.3", "conv2"),
        ("skip_connection", "conv_shortcut"),
    )
)


def unet_names(config: UNet2DConditionConfig) -> tuple[Names, ...]:
    """Return the name mapping for a U-Net; the original layout numbers the blocks of a path consecutively."""
    label = "add_embedding" if config.addition_embed_type is not None else "class_embedding"
    pairs = [
        ("time_embed.0", "time_embedding.linear_1"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("time_embed.cond_proj", "time_embedding.cond_proj"),
        ("label_emb.0.0", f"{label}.linear_1"),
        ("label_emb.0.2", f"{label}.linear_2"),
        ("label_emb.weight$", "class_embedding.weight$"),
        ("input_blocks.0.0", "conv_in"),
        ("out.0", "conv_norm_out"),
        ("out.2", "conv_out"),
    ]
    middles = {"UNetMidBlock2DCrossAttn": ("resnets.0", "attentions.0", "resnets.1"), "UNetMidBlock2D": ("resnets.0",)}
    pairs += [
        (f"middle_block.{i}", f"mid_block.{name}")
        for i, name in enumerate(middles.get(config.mid_block_type or "", ()))
    ]
    pairs += _down_names(config) + _up_names(config)
    positions = (Names(f"^{a}" if a[-1] == "$" else f"^{a}.", f"^{b}" if b[-1] == "$" else f"^{b}.") for a, b in pairs)
    return (*positions, *_RESNET)


def _down_names(config: UNet2DConditionConfig) -> list[tuple[str, str]]:
    pairs, index, last = [], 1, len(config.block_out_channels) - 1
    for level, layers in enumerate(config.per_block("layers_per_block")):
        for layer in range(layers):
            pairs.append((f"input_blocks.{index}.0", f"down_blocks.{level}.resnets.{layer}"))
            pairs.append((f"input_blocks.{index}.1", f"down_blocks.{level}.attentions.{layer}"))
            index += 1
        if level < last:
            pairs.append((f"input_blocks.{index}.0.op", f"down_blocks.{level}.downsamplers.0.conv"))
            index += 1
    return pairs


def _up_names(config: UNet2DConditionConfig) -> list[tuple[str, str]]:
    pairs, index = [], 0
    layers = config.per_block("layers_per_block")
    for block, level in enumerate(reversed(range(len(layers)))):
        crossed = config.up_block_types[block].startswith("CrossAttn")
        for layer in range(layers[level] + 1):
            if layer == layers[level] and level > 0:
                sampler = f"output_blocks.{index}.{2 if crossed else 1}.conv"
                pairs.append((sampler, f"up_blocks.{block}.upsamplers.0.conv"))
            pairs.append((f"output_blocks.{index}.0", f"up_blocks.{block}.resnets.{layer}"))
            pairs.append((f"output_blocks.{index}.1", f"up_blocks.{block}.attentions.{layer}"))
            index += 1
    return pairs


def vae_names(levels: int) -> tuple[Names, ...]:
    """Return the name mapping for an autoencoder; the original layout counts decoder levels in reverse order."""
    names = [
        Names("^encoder.down.#.block.#.", "^encoder.down_blocks.#.resnets.#."),
        Names("^encoder.down.#.downsample.conv.", "^encoder.down_blocks.#.downsamplers.0.conv."),
    ]
    for level in range(levels):
        block = levels - 1 - level
        names.append(Names(f"^decoder.up.{level}.block.#.", f"^decoder.up_blocks.{block}.resnets.#."))
        names.append(Names(f"^decoder.up.{level}.upsample.conv.", f"^decoder.up_blocks.{block}.upsamplers.0.conv."))
    attention = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    for half in ("encoder", "decoder"):
        middle = [("block_1", "resnets.0", "same"), ("block_2", "resnets.1", "same")]
        middle += [("attn_1.norm", "attentions.0.group_norm", "same")]
        middle += [(f"attn_1.{a}", f"attentions.0.{b}", "matrix") for a, b in attention.items()]
        names += [Names(f"^{half}.mid.{a}.", f"^{half}.mid_block.{b}.", form) for a, b, form in middle]
        names.append(Names(f"^{half}.norm_out.", f"^{half}.conv_norm_out."))
    return (*names, Names(".nin_shortcut.", ".conv_shortcut."))


_LAYER = ("^transformer.resblocks.#.", "^text_model.encoder.layers.#.")
OPEN_CLIP = (
    Names("^token_embedding.", "^text_model.embeddings.token_embedding."),
    Names("^positional_embedding$", "^text_model.embeddings.position_embedding.weight$"),
    *(
        Names(f"{_LAYER[0]}{original}.", f"{_LAYER[1]}{ours}.")
        for original, ours in (
            ("ln_1", "layer_norm1"),
            ("ln_2", "layer_norm2"),
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
            ("attn.out_proj", "self_attn.out_proj"),
        )
    ),
    Names(f"{_LAYER[0]}attn.in_proj_", f"{_LAYER[1]}self_attn.*_proj.", "thirds"),
    Names("^ln_final.", "^text_model.final_layer_norm."),
    Names("^text_projection$", "^text_projection.weight$", "transposed"),
)


def names_for(naming: str, config: Any) -> tuple[Names, ...]:
    """Return the name mapping for a network in the given naming scheme; empty if its names are ours already."""
    if naming == "original":
        return (
            unet_names(config) if hasattr(config, "cross_attention_dim") else vae_names(len(config.block_out_channels))
        )
    return OPEN_CLIP if naming == "open_clip" else ()
