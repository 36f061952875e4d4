"""`sfumato coreml convert`: a checkpoint as Core ML packages, proved right."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.errors import UsageError
from sfumato.files import check_writable

if TYPE_CHECKING:
    from sfumato.cli.terminal import Terminal
    from sfumato.coreml.conversion import Conversion, ConversionOptions
    from sfumato.coreml.source import Source

__all__ = ["EXAMPLES", "convert"]

EXAMPLES = """\b
Examples:
  sfumato coreml convert
  sfumato coreml convert stable-diffusion-v1-5/stable-diffusion-v1-5 --attention-implementation ORIGINAL
  sfumato coreml convert ./my-checkpoint --latent-h 64 --latent-w 96 -o my-packages
  sfumato coreml convert ./my-checkpoint --chunk-unet --quantize-nbits 6 --bundle-resources-for-swift-cli"""


def convert(
    checkpoint: Annotated[
        str | None, typer.Argument(help="A checkpoint folder or hub id; the built-in small model if left out.")
    ] = None,
    model_version: Annotated[str | None, typer.Option(help="The checkpoint, as Apple's converter calls it.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the packages; coreml-<name>/<attention>/packages if left out."),
    ] = None,
    attention: Annotated[
        str,
        typer.Option(
            "--attention-implementation",
            help="ORIGINAL for CPU and GPU, SPLIT_EINSUM or SPLIT_EINSUM_V2 for the Neural Engine.",
        ),
    ] = "SPLIT_EINSUM",
    latent_h: Annotated[
        int | None, typer.Option(help="Height of the latents (pixels / 8); the checkpoint's own if left out.")
    ] = None,
    latent_w: Annotated[int | None, typer.Option(help="Width of the latents, likewise.")] = None,
    quantize_nbits: Annotated[
        int | None,
        typer.Option(help="Compress text encoder and U-Net to 1, 2, 4, 6 or 8 bits a weight; 16 if left out."),
    ] = None,
    quantize_to_db: Annotated[
        float | None,
        typer.Option(help="Instead: for each layer the fewest bits that keep its weights this near, in dB."),
    ] = None,
    quantize_recipe: Annotated[
        Path | None, typer.Option(help="Instead: a JSON file with the bits of each weight by its name.")
    ] = None,
    chunk_unet: Annotated[bool, typer.Option("--chunk-unet", help="Cut the U-Net in two, for iOS and iPadOS.")] = False,
    chunks: Annotated[int | None, typer.Option(help="Cut the U-Net into this many instead, 1 to 8.")] = None,
    merge_chunks: Annotated[
        bool,
        typer.Option("--merge-chunks-in-pipeline-model", help="Put the chunks into one package that runs them all."),
    ] = False,
    bundle: Annotated[
        bool,
        typer.Option(
            "--bundle-resources-for-swift-cli",
            help="Also write compiled models with vocab.json and merges.txt, as Swift apps read them.",
        ),
    ] = False,
    text_encoder: Annotated[
        bool, typer.Option("--convert-text-encoder", help="Convert only the parts named so; all if none is.")
    ] = False,
    unet: Annotated[bool, typer.Option("--convert-unet", help="Likewise.")] = False,
    vae_decoder: Annotated[bool, typer.Option("--convert-vae-decoder", help="Likewise.")] = False,
    vae_encoder: Annotated[
        bool, typer.Option("--convert-vae-encoder", help="Likewise; only image-to-image needs it.")
    ] = False,
    min_deployment_target: Annotated[
        str, typer.Option(help="The oldest system to run on: macOS13, macOS14, …, iOS16, iOS17, ….")
    ] = "macOS13",
    unet_batch_one: Annotated[
        bool, typer.Option("--unet-batch-one", help="A U-Net that reads one prompt at a time: half the memory.")
    ] = False,
    compute_unit: Annotated[
        str | None, typer.Option(help="Accepted for Apple's scripts; a package runs on any, chosen when it is loaded.")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Variant of the weight files, such as fp16.")] = None,
    verify: Annotated[
        bool,
        typer.Option("--check-output-correctness/--no-verify", help="Prove what was converted against the checkpoint."),
    ] = True,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on where it was interrupted: keep the packages that are whole."),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace packages that are there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")] = False,
) -> None:
    """Convert a checkpoint to Core ML on any system, and prove the result. Prints the folder it is in."""
    if compute_unit is not None:
        from sfumato.coreml.backends import parse_compute_unit

        parse_compute_unit(compute_unit)
    from sfumato.checkpoints.builtin import BUILT_IN
    from sfumato.cli.coreml_verify import report, table
    from sfumato.cli.terminal import Terminal, print_json
    from sfumato.coreml import conversion
    from sfumato.coreml.layout import REQUIRED
    from sfumato.coreml.palettize import read_recipe
    from sfumato.coreml.roles import PARTS
    from sfumato.coreml.source import open_source

    if checkpoint is not None and model_version is not None and checkpoint != model_version:
        raise UsageError("the checkpoint is named twice; leave out --model-version")
    terminal = Terminal(quiet=quiet)
    named = {
        "text_encoder": text_encoder, "unet": unet, "vae_decoder": vae_decoder, "vae_encoder": vae_encoder,
    }  # fmt: skip
    options = conversion.ConversionOptions(
        parts=tuple(part for part in PARTS if named[part] or not any(named.values())),
        attention=attention.lower(),
        height=latent_h,
        width=latent_w,
        target=min_deployment_target,
        bits=quantize_nbits,
        target_db=quantize_to_db,
        recipe=None if quantize_recipe is None else read_recipe(quantize_recipe),
        chunks=chunks if chunks is not None else 2 if chunk_unet else 1,
        merged=merge_chunks,
        batch=1 if unet_batch_one else 2,
    )
    name = next((one for one in (checkpoint, model_version) if one is not None), BUILT_IN)
    source = open_source(name, variant=variant)
    folder, resources = _places(source, options, output)
    if bundle:
        check_writable(resources)
    made = _convert(terminal, source, folder, options, resume=resume, overwrite=overwrite)
    folders = [folder]
    if bundle:
        folders.append(_bundle(terminal, source, options.parts, folder, resources))
    whole = set(REQUIRED) <= set(options.parts)
    proofs = [
        report(terminal, place, source, options.parts, picture=whole and place == folder) for place in folders if verify
    ]
    if as_json:
        print_json(_summary(made, folders) | {"verifications": [proof.to_dict() for proof in proofs]})
    else:
        for proof in proofs:
            table(proof)
        for place in folders:
            typer.echo(place)
    if not all(proof.passed for proof in proofs):
        raise typer.Exit(1)


def _places(source: Source, options: ConversionOptions, output: Path | None) -> tuple[Path, Path]:
    """Where packages go, and compiled models: beside each other as on the hub, or as Apple's converter puts them."""
    from sfumato.coreml.layout import tree

    if output is not None:
        folder = output.expanduser()
        return folder, folder / "Resources"
    name = "coreml-" + Path(source.label).name
    return tree(Path(), name, options.attention, "packages"), tree(Path(), name, options.attention, "compiled")


def _convert(
    terminal: Terminal, source: Source, folder: Path, options: ConversionOptions, *, resume: bool, overwrite: bool
) -> Conversion:
    from sfumato.coreml import conversion

    with terminal.stages("converting") as stage:
        made = conversion.convert(source, folder, options, resume=resume, overwrite=overwrite, on_part=stage)
    if not terminal.quiet:
        for part in made.parts:
            how = "kept" if part.kept else f"{part.seconds:.1f} s"
            typer.echo(f"{part.part}: {part.bytes / 1e6:,.1f} MB, {how}", err=True)
    return made


def _bundle(terminal: Terminal, source: Source, parts: tuple[str, ...], packages: Path, place: Path) -> Path:
    from sfumato.coreml.layout import find_models
    from sfumato.coreml.resources import resources

    with terminal.working("compiling"):
        return resources(place, find_models(packages, kind="packages", required=parts), source.tokenizer)


def _summary(made: Conversion, folders: list[Path]) -> dict[str, Any]:
    return {
        "folders": [str(folder) for folder in folders],
        "parts": [
            {
                "part": part.part,
                "packages": [str(path) for path in part.paths],
                "bytes": part.bytes,
                "seconds": part.seconds,
                "kept": part.kept,
            }
            for part in made.parts
        ],
    }
