"""Detects what a file contains from its header (names, shapes, metadata) and from the files next to it.

Reads a handful of values at most, and does not import torch. What the user specifies overrides what is detected.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sfumato.checkpoints.geometry import text_config, unet_config, vae_config
from sfumato.errors import CheckpointError, UsageError, suggest
from sfumato.families import FAMILIES, Family, distilled, find

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from sfumato.checkpoints.headers import Header, Stored
    from sfumato.checkpoints.rules import Names

__all__ = ["ENCODERS", "TINY", "VAE", "Detected", "FilePart", "detect", "kind_of"]

UNETS = ("model.diffusion_model.", "diffusion_model.", "unet.", "")
AUTOENCODERS = ("first_stage_model.", "vae.", "")
# What `kind_of` calls them.
VAE, TINY = "an autoencoder (VAE)", "a tiny autoencoder (VAE)"
# The prefixes of text encoders in a file, and the naming scheme of their weights.
ENCODERS = (
    ("cond_stage_model.transformer.", "clip"),
    ("cond_stage_model.model.", "open_clip"),
    ("conditioner.embedders.0.transformer.", "clip"),
    ("conditioner.embedders.0.model.", "open_clip"),
    ("conditioner.embedders.1.model.", "open_clip"),
)
PREDICTIONS = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}
# Stable Diffusion 2.x files do not record the prediction type. In v-prediction models, this bias has a larger spread.
TELLING_BIAS, TELLING_SPREAD = "output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09
# Other kinds of file; the first match wins.
KINDS = (
    (r"^lora_|\.lora_(down|up|A|B)\.|[._]lora\.(down|up)\.|\.hada_w|\.lokr_w|\.dora_scale", "a LoRA"),
    (r"^(control_model|controlnet_cond_embedding|input_hint_block|controlnet_blocks)\.", "a ControlNet"),
    (r"(^|\.)(double_blocks\.0\.img_attn|distilled_guidance_layer|single_stream_modulation)", "a Flux model"),
    (r"(^|\.)joint_blocks\.0\.", "a Stable Diffusion 3 model"),
    (r"^clip_txt_mapper\.|^down_blocks\.\d+\.\d+\.channelwise\.", "a Stable Cascade model"),
    (r"motion_modules\.", "an AnimateDiff motion module"),
    (r"^adapter\.body|^body\.0\.(in_conv|block1)", "a T2I-Adapter"),
    (r"^(image_proj|ip_adapter)\.", "an IP-Adapter"),
    (r"^(emb_params|string_to_param|clip_[lg]$)", "a textual inversion"),
    (r"^encoder\.block\.\d+\.layer\.", "a T5 text encoder"),
    (r"^(text_model|transformer\.resblocks|vision_model)\.", "a CLIP encoder"),
    (r"^(model\.\d+|conv_first)\.", "an upscaler of pixels (ESRGAN)"),
    (r"(^|\.)(transformer_blocks|blocks|layers)\.0\.", "a transformer of another family"),
)


@dataclass(frozen=True)
class FilePart:
    """One network in a file: the prefix of its weight names, their naming scheme, its config, and its size.

    naming: "original" (CompVis and Stability), "ours" (as in folders), "clip" or "open_clip". dtype: that of most of
    its bytes, as safetensors spells it. names: its own name mapping, if `rules` has none for it.
    """

    prefix: str
    naming: str
    config: Mapping[str, Any]
    parameters: int
    bytes: int
    dtype: str
    names: tuple[Names, ...] | None = None


@dataclass(frozen=True)
class Detected:
    """What a file contains. `reasons` are sentences that say why; `notes` are warnings for the user."""

    family: Family
    parts: Mapping[str, FilePart]
    scheduler: Mapping[str, Any]
    steps: int
    reasons: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def missing(self) -> dict[str, str]:
        """Return the networks that the file lacks, each with a sentence on how to supply it."""
        wanted = {"unet": "U-Net", "vae": "VAE"}
        wanted |= {encoder.role: f"text encoder ({encoder.title})" for encoder in self.family.encoders}
        return {
            role: f"the file has no {words}; pass one with {role}=…, or use config=… (--config) with the folder "
            f"of a {self.family.title} checkpoint"
            for role, words in wanted.items()
            if role not in self.parts
        }


@dataclass
class _Case:
    """The state of detecting one file."""

    header: Header
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def tensors(self) -> Mapping[str, Stored]:
        return self.header.tensors

    def under(self, prefix: str) -> dict[str, Stored]:
        return {name.removeprefix(prefix): one for name, one in self.tensors.items() if name.startswith(prefix)}

    def told(self, key: str) -> str:
        return self.header.metadata.get(f"modelspec.{key}", "")

    def named(self, row: Family) -> re.Match[str] | None:
        """Match the family's name pattern against the file name and the titles in the metadata."""
        titles = (self.header.path.stem, self.told("title"), self.told("architecture"))
        plain = (re.sub(r"[^a-z0-9]+", "-", title.lower()) for title in titles if row.named)
        return next((match for title in plain if (match := re.search(row.named or "", title))), None)


def kind_of(names: Iterable[str]) -> str:
    """Describe a file that is not a checkpoint, given its tensor names."""
    names = list(names)
    if any(_autoencoder_naming(names, prefix) for prefix in AUTOENCODERS):
        return VAE
    if "decoder.layers.0.weight" in names and any(name.startswith("decoder.layers.2.conv.") for name in names):
        return TINY
    found = (words for pattern, words in KINDS if any(re.search(pattern, name) for name in names))
    return next(found, "of a kind that is not known")


def detect(
    header: Header,
    *,
    family: str | Family | None = None,
    prediction_type: str | None = None,
    yaml: str = "",
    vae: bool = False,
) -> Detected:
    """Detect what a file with this header contains.

    family, prediction_type: override what is detected. yaml: the text of the configuration next to the file. vae:
    whether only a VAE is needed. Raises `CheckpointError` if the file is not a checkpoint, and says what it is instead;
    raises `UsageError` for an unknown family or prediction type.
    """
    case = _Case(header)
    place = _unet_place(case)
    if place is None and not (vae and any(_autoencoder_naming(case.tensors, prefix) for prefix in AUTOENCODERS)):
        some = ", ".join(sorted(header.tensors)[:3]) or "no tensors"
        raise CheckpointError(
            f"{header.path} is {kind_of(header.tensors)}, not a checkpoint (it has {some}); give a file with a U-Net"
        )
    encoders = [pair for pair in ENCODERS if any(name.startswith(pair[0]) for name in case.tensors)]
    shapes = _unet_shapes(case, place[0]) if place else {}
    row = _family(case, shapes, encoders, family)
    prediction = _prediction(case, row, place[0] if place else "", prediction_type, yaml)
    if family is None and shapes and not (row.named or row.markers):
        same = (one for one in _rows(shapes, encoders, prediction) if not (one.markers or one.named))
        row = next((one for one in same if one.prediction_type == prediction), row)
    if "time_cond_proj_dim" in shapes and "time_cond_proj_dim" not in row.unet:
        row = distilled(row)
        case.reasons.append("distilled for few steps: it has a guidance embedding (cond_proj)")
    return Detected(
        family=row,
        parts=_parts(case, row, place, shapes, encoders),
        scheduler=_scheduler(case, row, prediction),
        steps=_steps(case, row),
        reasons=tuple(case.reasons),
        notes=tuple(case.notes),
    )


def _rows(
    shapes: dict[str, Any], encoders: Sequence[tuple[str, str]], prediction_type: str | None = None
) -> list[Family]:
    """Return the families that fit the U-Net and the text encoders. A file may lack the first of two encoders."""
    if not encoders:
        return find(shapes, prediction_type=prediction_type)
    count = 2 if encoders[-1] == ENCODERS[-1] else 1
    return find(shapes, encoders=count, naming=encoders[0][1], prediction_type=prediction_type)


def _unet_place(case: _Case) -> tuple[str, str] | None:
    """Return the prefix and the naming scheme of the U-Net."""
    for prefix in UNETS:
        for first, naming in (("input_blocks.0.0.weight", "original"), ("conv_in.weight", "ours")):
            stored = case.tensors.get(prefix + first)
            # ControlNets have the U-Net's names and additional ones.
            own = any(re.match(r"control(net)?_|input_hint_block|zero_convs", name) for name in case.tensors)
            if stored is not None and len(stored.shape) == 4 and not own:
                return prefix, naming
    return None


def _unet_shapes(case: _Case, prefix: str) -> dict[str, Any]:
    try:
        return unet_config(case.under(prefix))
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{case.header.path}: its U-Net has an unknown shape ({error}); the file is damaged, or of another kind"
        ) from error


def _family(
    case: _Case, shapes: dict[str, Any], encoders: Sequence[tuple[str, str]], given: str | Family | None
) -> Family:
    if isinstance(given, Family):
        return given
    if given is not None:
        if given not in FAMILIES:
            raise UsageError(
                f"there is no family {given!r}{suggest(given, FAMILIES)}; use one of {', '.join(FAMILIES)}"
            )
        case.reasons.append(f"{FAMILIES[given].title}, as requested")
        return FAMILIES[given]
    if not shapes:
        case.notes.append(
            "a VAE file does not contain the scale of its latents; Stable Diffusion 1.x is assumed until it is "
            "used in a pipeline"
        )
        return next(iter(FAMILIES.values()))
    rows = _rows(shapes, encoders)
    channels = shapes["in_channels"]
    if not rows:
        raise CheckpointError(
            f"{case.header.path}: no known family has a U-Net with {channels} input channels; specify one "
            f"with family=…: {', '.join(FAMILIES)}"
        )
    case.reasons.append(
        f"{rows[0].title}: a U-Net of {channels} channels, width {shapes['block_out_channels'][0]}, "
        f"prompt width {shapes.get('cross_attention_dim')}"
    )
    for row in rows:
        if row.markers and set(row.markers) <= case.tensors.keys():
            case.reasons.append(f"{row.title}: it has {' and '.join(row.markers)}")
            return row
        if match := case.named(row):
            case.reasons.append(f"{row.title}: its name contains {match[0]!r}")
            return row
    return next((row for row in rows if not row.markers and not row.named), rows[0])


def _prediction(case: _Case, row: Family, prefix: str, given: str | None, yaml: str) -> str:
    """Return the prediction type, from the user, the YAML file next to it, metadata, markers or the family."""
    architecture = "v_prediction" if case.told("architecture").endswith("-768-v") else None
    told = [
        (_from_yaml(yaml), "according to the configuration next to it"),
        (PREDICTIONS.get(case.told("prediction_type"), architecture), "according to its metadata"),
        ("v_prediction" if "v_pred" in case.tensors else None, "it has the marker v_pred"),
        ("sample" if re.search(r"step_x0(_|$)", case.header.path.stem) else None, "its name contains x0"),
        (_from_bias(case, row, prefix), "according to the spread of one of its biases"),
    ]
    value, why = next(((value, why) for value, why in told if value), (row.prediction_type, "like its family"))
    if given is None:
        case.reasons.append(f"predicts {value}: {why}")
        return value
    if given not in ("epsilon", "v_prediction", "sample"):
        raise UsageError(f"prediction_type must be epsilon, v_prediction or sample, not {given!r}")
    case.reasons.append(f"predicts {given}, as requested")
    if value != given and why != told[-1][1] and any(value for value, _ in told):
        case.notes.append(
            f"{case.header.path.name} is assumed to predict {given}, as requested; detected: {value} ({why})"
        )
    return given


def _from_yaml(text: str) -> str | None:
    if re.search(r"""(?m)parameterization:\s*["']?v["']?\s*$|VScaling""", text):
        return "v_prediction"
    return "epsilon" if re.search(r"""parameterization:\s*["']?eps|EpsScaling""", text) else None


def _from_bias(case: _Case, row: Family, prefix: str) -> str | None:
    base = row.unet.get("cross_attention_dim") == 1024 and not (row.extra or row.labels or row.named)
    numbers = case.header.numbers(prefix + TELLING_BIAS) if base else ()
    if not numbers:
        return None
    mean = sum(numbers) / len(numbers)
    spread = (sum((number - mean) ** 2 for number in numbers) / len(numbers)) ** 0.5
    return "v_prediction" if spread > TELLING_SPREAD else "epsilon"


def _scheduler(case: _Case, row: Family, prediction: str) -> dict[str, Any]:
    config = dict(row.scheduler)
    if prediction != row.prediction_type:
        config["prediction_type"] = prediction
    if "ztsnr" in case.tensors:
        # The last step is pure noise, which a schedule that starts below it would never reach.
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        case.reasons.append("trained down to no signal: it has the marker ztsnr")
    for key in ("sigma_max", "sigma_min"):
        if numbers := case.header.numbers(f"edm_vpred.{key}"):
            config[key] = numbers[0]
    return config


def _steps(case: _Case, row: Family) -> int:
    match = case.named(row)
    return int(match[1]) if match and match.groups() and match[1] else row.steps


def _parts(
    case: _Case,
    row: Family,
    place: tuple[str, str] | None,
    shapes: Mapping[str, Any],
    encoders: Sequence[tuple[str, str]],
) -> dict[str, FilePart]:
    parts: dict[str, FilePart] = {}
    vae = next(
        ((prefix, found) for prefix in AUTOENCODERS if (found := _autoencoder_naming(case.tensors, prefix))), None
    )
    values = row.vae if vae is None else _vae_values(case, row, vae[0])
    if place is not None:
        factor = 2 ** (len(values["block_out_channels"]) - 1)
        parts["unet"] = _part(case, *place, _unet_values(case, row, shapes, factor))
    if vae is not None:
        parts["vae"] = _part(case, *vae, values)
    for prefix, naming in encoders:
        fitting = [encoder for encoder in row.encoders if encoder.naming == naming]
        if fitting:
            usual = fitting[0].config
            parts[fitting[0].role] = _part(case, prefix, naming, usual | text_config(case.under(prefix), usual))
        else:
            case.notes.append(f"the text encoder at {prefix}… does not belong to {row.title} and is ignored")
    return parts


def _part(case: _Case, prefix: str, naming: str, config: Mapping[str, Any]) -> FilePart:
    own = case.under(prefix).values()
    held: dict[str, int] = {}
    for stored in own:
        held[stored.dtype] = held.get(stored.dtype, 0) + stored.bytes
    dtype = max(held, key=lambda name: held[name])
    return FilePart(prefix, naming, config, sum(stored.count for stored in own), sum(held.values()), dtype)


def _unet_values(case: _Case, row: Family, shapes: Mapping[str, Any], factor: int) -> dict[str, Any]:
    """Update the family's config with the detected shapes; heads are 64 wide unless their number is fixed."""
    values = row.unet | dict(shapes)
    widths = values["block_out_channels"]
    if not isinstance(values["attention_head_dim"], int) and widths != row.unet["block_out_channels"]:
        values["attention_head_dim"] = tuple(max(1, width // 64) for width in widths)
    match = re.fullmatch(r"(\d{2,4})x(\d{2,4})", case.told("resolution"))
    if match is not None and not row.extra:  # the training resolution, if it differs from the family's
        width, height = (int(side) // factor for side in match.groups())
        values["sample_size"] = width if width == height else (height, width)
    return values


def _vae_values(case: _Case, row: Family, prefix: str) -> dict[str, Any]:
    values = row.vae | vae_config(case.under(prefix))
    for key, name in (("latents_mean", "edm_mean"), ("latents_std", "edm_std")):
        if key in values and (numbers := case.header.numbers(name)):
            values[key] = numbers
    return values


def _autoencoder_naming(names: Iterable[str], prefix: str) -> str | None:
    names = names if hasattr(names, "keys") else set(names)
    if prefix + "decoder.conv_in.weight" not in names:
        return None
    return "ours" if prefix + "decoder.mid_block.resnets.0.norm1.weight" in names else "original"
