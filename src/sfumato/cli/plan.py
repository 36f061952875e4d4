"""`sfumato plan`: how a request would run on this or another machine, and whether it fits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.cli import details, options
from sfumato.cli.controls import controls, image_prompts
from sfumato.cli.drawing import mask_of, sized
from sfumato.families import FAMILIES

if TYPE_CHECKING:
    from sfumato.families import Family
    from sfumato.request import GenerateRequest
    from sfumato.runtime.choices import Plan, Sizes, Task
    from sfumato.runtime.facts import Facts

__all__ = ["EXAMPLES", "duration", "plan"]

EXAMPLES = """\b
Examples:
  sfumato plan "a red apple, 3d"
  sfumato plan "fog" -m sd15 -W 1024 -H 1024 --facts m1-8gb
  sfumato plan "fog" -m sd15 --hires 2 --hires-steps 15
  sfumato plan "a fox" --model ./my-checkpoint --count 64 --json
  sfumato plan "a fox" --model sdxl --refiner sdxl-refiner
  sfumato plan "a fox" --model sd15 --control canny:photo.jpg --controlnet ./control_v11p_sd15_canny
  sfumato plan "a fox" --model sd15 --facts rtx-4090 --largest"""


def plan(
    prompt: Annotated[str, typer.Argument(help="The prompt. Its wording does not affect the plan.")] = "",
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m",
            help="A checkpoint: folder, file, hub id in the local cache, or one of these short names: "
            f"{', '.join(FAMILIES)}. Default: your default model, or else the built-in one.",
            autocompletion=options.complete_models,
        ),
    ] = None,
    width: options.Width = None,
    height: options.Height = None,
    count: options.Count = 1,
    steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    hires: options.Hires = None,
    hires_upscaler: options.HiresUpscaler = None,
    hires_steps: options.HiresSteps = None,
    image: Annotated[Path | None, typer.Option(help="The image to start from; its size is that of the result.")] = None,
    strength: Annotated[float | None, typer.Option(help="How much to change it, 0 to 1. Default: 0.8, or 1.")] = None,
    mask: options.MaskFile = None,
    extend: options.Extend = None,
    mask_crop: options.MaskCrop = None,
    control: options.ControlPicture = None,
    controlnet: options.ControlNets = None,
    image_prompt: options.ImagePrompts = None,
    ip_adapter: options.IPAdapters = None,
    image_encoder: options.ImageEncoder = None,
    vae: options.Vae = None,
    draft: options.Draft = False,
    dtype: options.Dtype = None,
    device: options.Device = None,
    variant: options.Variant = None,
    refiner: Annotated[
        str | None,
        typer.Option(
            help="A second checkpoint that takes over for the last steps; planned after the first.",
            autocompletion=options.complete_models,
        ),
    ] = None,
    facts: Annotated[
        str | None,
        typer.Option(help="Plan for another machine: a JSON file of facts, or a name such as m1-8gb."),
    ] = None,
    largest: Annotated[bool, typer.Option("--largest", help="Print only the maximum batch size.")] = False,
    as_json: options.AsJson = False,
) -> None:  # fmt: skip
    """Show how a request would run, with reasons.

    Covers precision, batch size, memory and time. Loads no weights and generates nothing.
    """
    from sfumato.cli.early import check_choices
    from sfumato.cli.settings import chosen_model
    from sfumato.cli.terminal import print_json
    from sfumato.request import GenerateRequest
    from sfumato.runtime.choices import Wishes, task_of
    from sfumato.runtime.facts import facts_named
    from sfumato.runtime.plan import largest_batch
    from sfumato.runtime.plan import plan as make_plan

    request = GenerateRequest(
        prompt=prompt, width=width, height=height, count=count, steps=steps, guidance_scale=guidance_scale,
        refiner=refiner, vae=vae, draft=draft, hires=details.hires(hires, upscaler=hires_upscaler, steps=hires_steps),
        image=None if image is None else str(image), strength=strength,
        mask=mask_of(mask, extend, None, mask_crop), controls=controls(control or (), controlnet or (), "crop"),
        image_prompts=image_prompts(image_prompt or (), ip_adapter or (), image_encoder),
    )  # fmt: skip
    request = sized(request)
    check_choices(device, dtype=dtype)
    wishes = Wishes(device=device, dtype=dtype, once=True)
    other = facts_named(facts) if facts else None
    sizes, request = _settled(chosen_model(model), request, variant)
    machine = other or _this_machine(device, sizes)
    if largest:
        batch = largest_batch(machine, sizes, request, wishes)
        print_json({"largest_batch": batch}) if as_json else typer.echo(batch)
        return
    found = [(make_plan(machine, sizes, request, wishes), sizes, request)]
    if refiner is not None:
        task = task_of(sizes, request)
        size = ((task.first or task).width, (task.first or task).height)
        then = request.last_pass(size, sizes.vae_config.scale_factor)
        then = then.replace(refiner=None, denoising_start=then.denoising_end, denoising_end=None)
        sizes, then = _settled(refiner, then, variant)
        found.append((make_plan(machine, sizes, then, wishes), sizes, then))
    if as_json:
        one, *rest = [_as_dict(planned, machine, sizes) for planned, sizes, _ in found]
        print_json(one | ({"refiner": rest[0]} if rest else {}))
        return
    for planned, sizes, asked in found:
        _show(planned, machine, task_of(sizes, asked), _other_side(asked, sizes))


def _this_machine(device: str | None, sizes: Sizes) -> Facts:
    from sfumato.runtime.canaries import checked
    from sfumato.runtime.facts import read_facts

    return checked(read_facts(device), sizes)


def _settled(model: str, request: GenerateRequest, variant: str | None) -> tuple[Sizes, GenerateRequest]:
    """Return a model's sizes, and the request with the model's default settings filled in."""
    from sfumato.cli.early import check_model
    from sfumato.runtime.choices import enlarged

    published = _published(model)
    if not published:
        check_model(model, request, downloads=False)
    sizes, settings, family = published or _sizes(model, variant)
    if request.draft:
        from sfumato.pipelines.drafts import Sketched, drafted

        request, _ = drafted(request, Sketched(model, family, settings, sizes.vae_config, model))
    if request.controls or request.image_prompts or request.vae:
        from sfumato.pipelines.controlling import with_sizes

        sizes = with_sizes(sizes, request)
    return sizes, enlarged(sizes, request.settled(settings))


def _published(model: str) -> tuple[Sizes, dict[str, Any], Family] | None:
    """Return a family's published sizes, its settings and itself by its short name; None for other models."""
    import os

    if model not in FAMILIES or os.path.isdir(model):
        return None
    from sfumato.checkpoints.family import settings_of
    from sfumato.runtime.choices import published_sizes

    return published_sizes(model), settings_of(FAMILIES[model]), FAMILIES[model]


def _sizes(name: str, variant: str | None) -> tuple[Sizes, dict[str, Any], Family]:
    """Return the sizes of a model on this machine, its default settings and its family."""
    from sfumato.pipelines.components import ComponentFiles
    from sfumato.pipelines.sizes import read_sizes
    from sfumato.pipelines.source import open_source

    source = open_source(name, ComponentFiles(variant), {"local_files_only": True})
    return read_sizes(source), source.settings, source.family


def _other_side(request: GenerateRequest, sizes: Sizes) -> str:
    """Return a note on the side that was not given, if the other one was."""
    if (request.width is None) == (request.height is None):
        return ""
    own = dict(zip(("width", "height"), sizes.picture_size, strict=True))
    given, other = ("width", "height") if request.height is None else ("height", "width")
    return f"only the {given} was given, so the {other} is the model's own, {own[other]}; set it with --{other}"


def _as_dict(found: Plan, machine: Facts, sizes: Sizes) -> dict[str, object]:
    import dataclasses

    from sfumato.runtime.choices import PARTS

    parts = {part: getattr(sizes, part) for part in PARTS}
    return {
        "machine": machine.name,
        "model": {"name": sizes.name, **{name: dataclasses.asdict(part) for name, part in parts.items()}},
        "plan": dataclasses.asdict(found),
    }


def _show(found: Plan, machine: Facts, task: Task, note: str) -> None:
    from rich.markup import escape
    from rich.table import Table

    from sfumato.cli.terminal import output
    from sfumato.runtime.reasons import gigabytes

    console = output()
    images = "1 image" if task.pictures == 1 else f"{task.pictures} images"
    console.print(
        f"[bold]{escape(task.sizes.name)}[/bold] on [bold]{escape(machine.name)}[/bold]: {images} of "
        f"{task.width} × {task.height}, {_steps(task)}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("setting", "value", box=None, pad_edge=False)
    for what, choice in _choices(found):
        table.add_row(what, escape(choice))
    table.add_row("peak memory", f"{gigabytes(found.peak_bytes)} of {gigabytes(found.free_bytes)} free")
    table.add_row("time", f"about {duration(found.seconds)}")
    console.print(table)
    for sentence in (*([note] if note else []), *found.reasons):
        console.print(f"- {escape(sentence)}", highlight=False, soft_wrap=True)


def _steps(task: Task) -> str:
    """The steps of all passes."""
    first = task.first
    return f"{task.steps} steps" + (f" after {first.steps} of {first.width} × {first.height}" if first else "")


def _choices(found: Plan) -> list[tuple[str, str]]:
    from sfumato.runtime.reasons import gigabytes

    dtypes = [found.text_encoder_dtype, found.unet_dtype, found.vae_dtype]
    chunk = "" if found.attention_bytes is None else f", {gigabytes(found.attention_bytes)}"
    decoding = [word for word, on in (("sliced", found.vae_slicing), ("tiled", found.vae_tiling)) if on]
    threads = "" if found.threads is None else f", {found.threads} thread{'s' if found.threads > 1 else ''}"
    return [
        ("device", found.device + threads),
        ("dtype", dtypes[0] if len(set(dtypes)) == 1 else "text encoder {}, U-Net {}, VAE {}".format(*dtypes)),
        *([("weights", "of the U-Net in 8 bits")] if found.eight_bit else []),
        ("engine", f"{found.engine}, {found.memory_format}, {'compiled' if found.compile else 'not compiled'}"),
        ("attention", found.attention + chunk),
        ("images per batch", str(found.micro_batch)),
        ("VAE decoding", ", ".join(decoding) or "whole images"),
        ("networks in memory", "all" if found.offload == "none" else "one at a time"),
    ]


def duration(seconds: float) -> str:
    """Format seconds, such as "2.4 s", "35 s", "13 min" or "5.2 h"."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
