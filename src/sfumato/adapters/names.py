"""Maps an adapter file's keys to our modules and to the part of the change that each key holds.

Keys are looked up in a dictionary of all spellings of our modules' names, so underscores are never ambiguous. Dialects
differ only in the beginnings and endings of keys.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sfumato.checkpoints.rules import original_name, unet_names

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["Place", "flat", "places_of", "split_key", "walked"]

# Beginnings of the keys of each network, longest first; "" is the plain path, as in a file of a single network.
BEGINNINGS = {
    "unet": (
        "base_model.model.unet.", "unet.base_model.model.", "base_model.model.", "model.diffusion_model.", "lora_unet_",
        "oft_unet_", "lycoris_unet_", "lycoris_", "diffusion_model.", "unet.", "",
    ),
    "text_encoder": (
        "text_encoder.base_model.model.", "text_encoders.clip_l.transformer.", "clip_l.transformer.",
        "base_model.model.", "lora_te1_", "lora_te_", "oft_te_", "lycoris_te_", "lycoris_te1_", "text_encoder.", "",
    ),
    "text_encoder_2": (
        "text_encoder_2.base_model.model.", "text_encoders.clip_g.transformer.", "clip_g.transformer.", "lora_te2_",
        "lycoris_te2_", "text_encoder_2.",
    ),
}  # fmt: skip
# Endings of keys, longest first, and our names for the parts.
ENDINGS = {
    "lora_linear_layer.down.weight": "down", "lora_linear_layer.up.weight": "up", "lora.down.weight": "down",
    "lora.up.weight": "up", "lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "mid",
    "lora_A.weight": "down", "lora_B.weight": "up", "lora_B.bias": "up_bias",
    "lora_magnitude_vector.weight": "magnitude", "lora_magnitude_vector": "magnitude",
    "dora_scale": "dora_scale", "alpha": "alpha",
    "ia3_l": "ia3_l", "on_input": "on_input", "set_weight": "set_weight", "oft_blocks": "oft_blocks",
    "rescale": "rescale", "diff_b": "diff_b", "diff": "diff", "w_norm": "diff", "b_norm": "diff_b",
    **{f"hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": f"lokr_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2", "w1", "w2")},
    **{f"{name}.weight": name for name in ("a1", "a2", "b1", "b2")},
    "weight": "ia3",
}  # fmt: skip
# The earliest files of diffusers: "….processor.to_q_lora.down.weight".
FIRST = re.compile(r"\.?(?:processor\.)?(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight$")
_PEFT = re.compile(r"(lora_[AB]|lora_magnitude_vector|(?:hada|lokr)_w?\w+|ia3_l)\.default\b")


@dataclass(frozen=True)
class Place:
    """One of our modules. role: its network; path: its name in that network."""

    role: str
    path: str

    @property
    def name(self) -> str:
        """Role and path joined; weights for parts of a network refer to the beginnings of such names."""
        return f"{self.role}.{self.path}"


def split_key(key: str) -> tuple[str, str] | None:
    """Split a key into the module, in the file's spelling, and the part of the change; None if it is unknown."""
    if first := FIRST.search(key):
        return f"{key[: first.start()]}.{first[1]}", first[2]
    key = _PEFT.sub(r"\1", key)
    for ending, part in ENDINGS.items():
        if key.endswith(f".{ending}"):
            return key[: -len(ending) - 1], part
    return None


def places_of(networks: Mapping[str, Any], shapes: Mapping[str, Mapping[str, Any]]) -> dict[str, Place]:
    """Return our modules by every spelling of their names, with "_" instead of dots.

    networks: by role; shapes: of each network's weights, by name.
    """
    places: dict[str, Place] = {}
    for role in reversed([role for role in BEGINNINGS if role in networks]):
        paths = {name.rpartition(".")[0] for name in shapes[role]}
        numbered = unet_names(networks[role].config) if role == "unet" else ()
        for path in paths:
            spellings = [path, *_first_spellings(path)]
            if role == "unet":
                spellings.append(original_name(f"{path}.", numbered)[0].removesuffix("."))
            else:
                spellings += [one.removeprefix("text_model.") for one in spellings]
            for spelling in spellings:
                for beginning in BEGINNINGS[role]:
                    places[flat(beginning + spelling)] = Place(role, path)
    return places


def flat(name: str) -> str:
    """Return a name with "_" instead of dots, the form that all dialects share."""
    return name.replace(".", "_")


def _first_spellings(path: str) -> list[str]:
    """Return the names of attention layers, including those of text encoders, in the earliest files of diffusers."""
    renamed = re.sub(r"self_attn\.(q|k|v|out)_proj$", r"self_attn.to_\1", path)
    renamed = re.sub(r"to_out\.0$", "to_out", renamed)
    return [renamed] if renamed != path else []


def walked(paths: Iterable[str], classes: Sequence[str]) -> list[str]:
    """Sort linear layers in the order of cloneofsimo's library, for the classes that a file names.

    The order is down, up, middle; within a block: self-attention, feed-forward gate, cross-attention.
    """
    kinds = {"CrossAttention": r"attn\d\.\w+(\.0)?", "Attention": r"attn\d\.\w+(\.0)?", "GEGLU": r"ff\.net\.0\.proj"}
    kinds["CLIPAttention"] = r"self_attn\.\w+"
    pattern = re.compile("(.*)\\.(?:" + "|".join(kinds[one] for one in classes if one in kinds) + ")")
    order = {"down_blocks": 0, "up_blocks": 1, "mid_block": 2}
    inner = ("attn1", "ff", "attn2", "to_q", "to_k", "to_v", "to_out.0", "k_proj", "v_proj", "q_proj", "out_proj")
    found = [(path, match[1]) for path in paths if (match := pattern.fullmatch(path))] if classes else []
    blocks = {block: number for number, (_, block) in reversed([*enumerate(found)])}

    def key(entry: tuple[str, str]) -> tuple[Any, ...]:
        path, block = entry
        rest = path[len(block) + 1 :]
        first, _, last = rest.partition(".")
        return (
            order.get(path.partition(".")[0], 0),
            blocks[block],
            inner.index(first) if first in inner else 0,
            inner.index(last) if last in inner else 0,
        )

    return [path for path, _ in sorted(found, key=key)]
