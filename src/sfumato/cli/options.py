"""Options shared by several commands, each defined once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sfumato.checkpoints.names import EXAMPLE
from sfumato.request import PREPROCESSORS

__all__ = [
    "AsJson",
    "Config",
    "ControlFit",
    "ControlNets",
    "ControlPicture",
    "Count",
    "DepthFile",
    "Device",
    "Draft",
    "Dtype",
    "Extend",
    "Family",
    "GuidanceScale",
    "Height",
    "Hires",
    "HiresScheduler",
    "HiresSteps",
    "HiresUpscaler",
    "IPAdapters",
    "ImageEncoder",
    "ImageGuidance",
    "ImagePrompts",
    "MaskCrop",
    "MaskEdge",
    "MaskFile",
    "Model",
    "NoiseLevel",
    "OutputImage",
    "Overwrite",
    "PredictionType",
    "Quiet",
    "SchedulerName",
    "Seed",
    "Steps",
    "Vae",
    "Variant",
    "Width",
    "complete_models",
]


def complete_models(incomplete: str) -> list[str]:
    """Return short names that start with `incomplete`, for shell completion."""
    from sfumato.checkpoints.builtin import BUILT_IN
    from sfumato.checkpoints.names import PUBLISHED

    return [name for name in (BUILT_IN, *PUBLISHED) if name.startswith(incomplete)]


def _complete_schedulers(incomplete: str) -> list[str]:
    from sfumato.schedulers.names import NAMES

    return [name for name in NAMES if name.startswith(incomplete)]


def _complete_dtypes(incomplete: str) -> list[str]:
    return [name for name in ("float32", "float16", "bfloat16") if name.startswith(incomplete)]


def _complete_devices(incomplete: str) -> list[str]:
    return [name for name in ("cuda", "mps", "cpu") if name.startswith(incomplete)]


Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m",
        help=f"A checkpoint: folder, file, hub id, or a short name such as {EXAMPLE} ('sfumato models' lists them). "
        "Default: your default model, or else the built-in one.",
        autocompletion=complete_models,
    ),
]  # fmt: skip
Variant = Annotated[str | None, typer.Option(help="Variant of the weight files, such as fp16.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps. Default: the model's own number, usually 50.")]
GuidanceScale = Annotated[
    float | None,
    typer.Option(
        help="How closely to follow the prompt. 1 or less turns guidance off and halves the work. Default: the model's "
        "own value, usually 7.5."
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", "-s", help="The seed; image i uses seed + i. Default: random.")]
Count = Annotated[int, typer.Option("--count", "-n", help="Number of images.")]
Width = Annotated[int | None, typer.Option("--width", "-W", help="Width in pixels. Default: the model's own size.")]
Height = Annotated[int | None, typer.Option("--height", "-H", help="Height in pixels. Default: the model's own size.")]
SchedulerName = Annotated[
    str | None,
    typer.Option(
        help="A name from 'sfumato schedulers', or another program's name for it, such as \"DPM++ 2M Karras\". "
        "Default: the model's own.",
        autocompletion=_complete_schedulers,
    ),
]
Hires = Annotated[
    str | None,
    typer.Option(metavar="SCALE|WIDTHxHEIGHT", help="Enlarge the image and refine it in a second pass (hires fix)."),
]
HiresUpscaler = Annotated[
    str | None, typer.Option(help="latent, latent-bicubic, latent-nearest, … or lanczos (pixels). Default: latent.")
]
HiresSteps = Annotated[int | None, typer.Option(help="Steps of the second pass. Default: as many as the first.")]
HiresScheduler = Annotated[
    str | None,
    typer.Option(help="The second pass's scheduler. Default: as the first.", autocompletion=_complete_schedulers),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, float16 or bfloat16. Default: the fastest one that is safe on the device.",
        autocompletion=_complete_dtypes,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="cuda, mps or cpu. Default: the best one available.", autocompletion=_complete_devices),
]
LoraFolder = Annotated[
    Path | None,
    typer.Option(
        envvar="SFUMATO_LORA_DIR",
        help="A folder of adapters, for <lora:name:weight> in prompts and for files that have moved.",
    ),
]
MaskFile = Annotated[
    Path | None,
    typer.Option(
        "--mask",
        help="Change the image only where this mask, an image of the same size, is white; gray changes less.",
    ),
]
Extend = Annotated[
    str | None,
    typer.Option(metavar="SIDE=PIXELS,…", help="Extend the input image by pixels per side, such as left=256,top=64."),
]
MaskEdge = Annotated[
    int | None,
    typer.Option(help="Width of the mask's soft edge in pixels. Default: 0, or 16 with --extend."),
]
MaskCrop = Annotated[
    int | None,
    typer.Option(
        help="Generate only the masked area and this many pixels around it, enlarged, and paste the result back."
    ),
]
DepthFile = Annotated[
    Path | None,
    typer.Option(
        "--depth",
        help="A depth map of the input image, with near areas white, for depth-to-image models. Default: estimated.",
    ),
]
ImageGuidance = Annotated[
    float | None,
    typer.Option(help="How closely instruction-based editing models follow the input image, at least 1. Default: 1.5."),
]
NoiseLevel = Annotated[
    int | None,
    typer.Option(
        help="Noise added to the input of upscalers (default: 20) and of image variations (default: 0), out of 1000."
    ),
]
Vae = Annotated[
    str | None,
    typer.Option(help="Another VAE in place of the model's own: folder, file, hub id, or built-in/tiny-vae."),
]
Draft = Annotated[
    bool,
    typer.Option(
        "--draft", help="A quick first look: fewer steps, and a tiny decoder where one is at hand. Your settings win."
    ),
]
ControlPicture = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KIND:IMAGE[:SCALE[:START[:END]]]",
        help="An image that guides the composition, and its preprocessing: "
        f"{', '.join(PREPROCESSORS[1:])}, or {PREPROCESSORS[0]}. Repeatable, with one --controlnet for each.",
    ),
]
ControlNets = Annotated[
    list[str] | None,
    typer.Option("--controlnet", help="The ControlNet for the control image: folder, file or hub id. Repeatable."),
]
ControlFit = Annotated[
    str, typer.Option(help="How to fit control images of another aspect ratio: crop, pad or stretch.")
]
ImagePrompts = Annotated[
    list[str] | None,
    typer.Option(
        metavar="IMAGE[:SCALE]", help="An image to use like a prompt, with one --ip-adapter for each. Repeatable."
    ),
]
IPAdapters = Annotated[
    list[str] | None,
    typer.Option("--ip-adapter", help="The IP-Adapter for the image prompt (safetensors). Repeatable."),
]
ImageEncoder = Annotated[
    str | None, typer.Option(help="The folder of the CLIP image encoder that the IP-Adapters were trained with.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace existing files. Default: use the next free name.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Hide progress and notes.")]
Family = Annotated[
    str | None,
    typer.Option(
        help="The family of a checkpoint file, if detection is wrong; see the names in 'sfumato plan --help'."
    ),
]
PredictionType = Annotated[
    str | None,
    typer.Option(help="What the file's U-Net predicts, if detection is wrong: epsilon, v_prediction or sample."),
]
Config = Annotated[
    str | None,
    typer.Option(help="A similar checkpoint that supplies the configs of a file, and the parts the file lacks."),
]
OutputImage = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="A PNG, JPEG or WebP file, or a folder. Default: a PNG named after the prompt."
    ),
]
