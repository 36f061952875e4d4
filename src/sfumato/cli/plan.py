"""`sfumato plan`: what would be done with a request on this machine or another, and whether it fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sfumato.runtime.choices import Plan, Sizes, Task
    from sfumato.runtime.facts import Facts

__all__ = ["EXAMPLES", "duration", "plan"]

EXAMPLES = """\b
Examples:
  sfumato plan "a red apple, 3d"
  sfumato plan "fog" --model sd15 --width 1024 --height 1024 --facts m1-8gb
  sfumato plan "a fox" --model ./my-checkpoint --count 64 --json
  sfumato plan "a fox" --model sd15 --facts rtx-4090 --largest"""


def plan(
    prompt: Annotated[str, typer.Argument(help="What to draw; only its being there counts here.")] = "",
    model: Annotated[
        str | None,
        typer.Option(
            help="A checkpoint folder or a hub id in the local cache; the built-in model if left out. sd15 stands "
            "for the sizes of Stable Diffusion 1.5, which need not be here."
        ),
    ] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; the checkpoint's own size if left out.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; the checkpoint's own size if left out.")] = None,
    count: Annotated[int, typer.Option(help="How many pictures.")] = 1,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps; 50, or what the model asks for, if left out.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="1 or less turns guidance off, and halves the work.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16, instead of the plan's own.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu, instead of the best one present.")] = None,
    variant: Annotated[str | None, typer.Option(help="Variant of the weight files, such as fp16.")] = None,
    facts: Annotated[
        str | None,
        typer.Option(help="Another machine: a JSON file of facts, or a name such as m1-8gb; this one if left out."),
    ] = None,
    largest: Annotated[bool, typer.Option("--largest", help="Say only how many pictures fit into one batch.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say how a request would be carried out: choices and why, peak memory, time. Loads no weights, draws nothing."""
    from sfumato.cli.drawing import given
    from sfumato.cli.terminal import print_json
    from sfumato.request import GenerateRequest
    from sfumato.runtime.choices import Wishes, task_of
    from sfumato.runtime.facts import facts_named, read_facts
    from sfumato.runtime.plan import largest_batch
    from sfumato.runtime.plan import plan as make_plan

    asked = given(steps=steps, guidance_scale=guidance_scale)
    request = GenerateRequest(prompt=prompt, width=width, height=height, count=count, **asked)
    wishes = Wishes(device=device, dtype=dtype, once=True)
    machine = facts_named(facts) if facts else read_facts(device)
    sizes, suggested = _sizes(model, variant)
    request = request.replace(**suggested | asked)
    if largest:
        batch = largest_batch(machine, sizes, request, wishes)
        print_json({"largest_batch": batch}) if as_json else typer.echo(batch)
        return
    found = make_plan(machine, sizes, request, wishes)
    if as_json:
        print_json(_as_dict(found, machine, sizes))
        return
    _show(found, machine, task_of(sizes, request))


def _sizes(model: str | None, variant: str | None) -> tuple[Sizes, dict[str, Any]]:
    """The sizes of a model, and the settings it suggests."""
    if model == "sd15":
        from sfumato.runtime.choices import stable_diffusion_15

        return stable_diffusion_15(), {}
    from sfumato.checkpoints.builtin import BUILT_IN
    from sfumato.checkpoints.locate import locate_folder
    from sfumato.checkpoints.suggested import suggested_settings
    from sfumato.pipelines.components import ComponentFiles
    from sfumato.pipelines.sizes import read_sizes

    name = model or BUILT_IN
    folder = locate_folder(name, ComponentFiles(variant).select, local_files_only=True)
    return read_sizes(name, variant), suggested_settings(folder)


def _as_dict(found: Plan, machine: Facts, sizes: Sizes) -> dict[str, object]:
    import dataclasses

    from sfumato.runtime.choices import PARTS

    parts = {part: getattr(sizes, part) for part in PARTS}
    return {
        "machine": machine.name,
        "model": {"name": sizes.name, **{name: dataclasses.asdict(part) for name, part in parts.items()}},
        "plan": dataclasses.asdict(found),
    }


def _show(found: Plan, machine: Facts, task: Task) -> None:
    from rich.markup import escape
    from rich.table import Table

    from sfumato.cli.terminal import output
    from sfumato.runtime.reasons import gigabytes

    console = output()
    pictures = "one picture" if task.pictures == 1 else f"{task.pictures} pictures"
    console.print(
        f"[bold]{escape(task.sizes.name)}[/bold] on [bold]{escape(machine.name)}[/bold]: {pictures} of "
        f"{task.width} × {task.height}, {found.steps} steps",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("what", "choice", box=None, pad_edge=False)
    for what, choice in _choices(found):
        table.add_row(what, escape(choice))
    table.add_row("peak memory", f"{gigabytes(found.peak_bytes)} of {gigabytes(found.free_bytes)} free")
    table.add_row("time", f"about {duration(found.seconds)}")
    console.print(table)
    for sentence in found.reasons:
        console.print(f"- {escape(sentence)}", highlight=False, soft_wrap=True)


def _choices(found: Plan) -> list[tuple[str, str]]:
    dtypes = [found.text_encoder_dtype, found.unet_dtype, found.vae_dtype]
    chunk = "" if found.attention_bytes is None else f", {found.attention_bytes / 2**20:,.0f} MiB"
    decoding = [word for word, on in (("sliced", found.vae_slicing), ("tiled", found.vae_tiling)) if on]
    return [
        ("device", found.device + ("" if found.threads is None else f", threads: {found.threads}")),
        ("dtype", dtypes[0] if len(set(dtypes)) == 1 else "text encoder {}, U-Net {}, VAE {}".format(*dtypes)),
        ("engine", f"{found.engine}, {found.memory_format}, {'compiled' if found.compile else 'not compiled'}"),
        ("attention", found.attention + chunk),
        ("pictures at a time", str(found.micro_batch)),
        ("VAE", ", ".join(decoding) or "whole pictures"),
        ("networks in memory", "all" if found.offload == "none" else "one after the other"),
    ]


def duration(seconds: float) -> str:
    """Seconds as a person says them: "2.4 s", "35 s", "13 min", "5.2 h"."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
