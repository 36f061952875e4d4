"""`sfumato coreml convert`: converts a checkpoint to verified Core ML packages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.cli import options
from sfumato.errors import UsageError
from sfumato.files import check_writable, expanded

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
        str | None,
        typer.Argument(
            help="A checkpoint: folder, file, hub id or short name. Default: your default model, or else the "
            "built-in one.",
            autocompletion=options.complete_models,
        ),
    ] = None,
    model_version: Annotated[
        str | None, typer.Option(help="The checkpoint, under the name that Apple's converter uses.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder for the packages. Default: coreml-<name>/<attention>/packages."
        ),
    ] = None,
    attention: Annotated[
        str,
        typer.Option(
            "--attention-implementation",
            help="ORIGINAL for CPU and GPU, SPLIT_EINSUM or SPLIT_EINSUM_V2 for the Neural Engine.",
        ),
    ] = "SPLIT_EINSUM",
    latent_h: Annotated[
        int | None, typer.Option(help="Height of the latents (pixels / 8). Default: the checkpoint's own.")
    ] = None,
    latent_w: Annotated[
        int | None, typer.Option(help="Width of the latents (pixels / 8). Default: the checkpoint's own.")
    ] = None,
    quantize_nbits: Annotated[
        int | None,
        typer.Option(
            help="Compress the text encoder and the U-Net to 1, 2, 4, 6 or 8 bits per weight. Default: 16 bits."
        ),
    ] = None,
    quantize_to_db: Annotated[
        float | None,
        typer.Option(help="Alternatively: for each layer, the fewest bits that keep its weights this accurate, in dB."),
    ] = None,
    quantize_recipe: Annotated[
        Path | None, typer.Option(help="Alternatively: a JSON file with the number of bits for each weight.")
    ] = None,
    chunk_unet: Annotated[
        bool, typer.Option("--chunk-unet", help="Split the U-Net in two, for iOS and iPadOS.")
    ] = False,
    chunks: Annotated[int | None, typer.Option(help="Split the U-Net into this many chunks, 1 to 8.")] = None,
    merge_chunks: Annotated[
        bool,
        typer.Option(
            "--merge-chunks-in-pipeline-model", help="Also put the chunks into one package that runs all of them."
        ),
    ] = False,
    bundle: Annotated[
        bool,
        typer.Option(
            "--bundle-resources-for-swift-cli",
            help="Also write compiled models with vocab.json and merges.txt, as Swift apps need them.",
        ),
    ] = False,
    text_encoder: Annotated[
        bool,
        typer.Option("--convert-text-encoder", help="Convert only the text encoder (can be combined). Default: all."),
    ] = False,
    unet: Annotated[bool, typer.Option("--convert-unet", help="Convert only the U-Net.")] = False,
    vae_decoder: Annotated[bool, typer.Option("--convert-vae-decoder", help="Convert only the VAE decoder.")] = False,
    vae_encoder: Annotated[
        bool,
        typer.Option("--convert-vae-encoder", help="Convert only the VAE encoder (needed only for image-to-image)."),
    ] = False,
    min_deployment_target: Annotated[
        str, typer.Option(help="The oldest system to support: macOS13, macOS14, …, iOS16, iOS17, ….")
    ] = "macOS13",
    unet_batch_one: Annotated[
        bool,
        typer.Option("--unet-batch-one", help="Give the U-Net a batch size of 1, which halves its memory."),
    ] = False,
    compute_unit: Annotated[
        str | None,
        typer.Option(help="Ignored; accepted for Apple's scripts. Chosen when a package is loaded."),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[:WEIGHT[:TEXT_WEIGHT]]", help="Adapter to bake into the weights. Repeatable."),
    ] = None,
    variant: options.Variant = None,
    verify: Annotated[
        bool,
        typer.Option("--check-output-correctness/--no-verify", help="Verify the result against the checkpoint."),
    ] = True,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue an interrupted conversion; finished packages are kept."),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing packages.")] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:  # fmt: skip
    """Convert a checkpoint to Core ML, and verify the result.

    Runs on any system. Prints the folder of the result.
    """
    from sfumato.cli.early import check_model
    from sfumato.cli.settings import chosen_model

    if checkpoint is not None and model_version is not None and checkpoint != model_version:
        raise UsageError("the checkpoint is given twice; drop --model-version")
    name = chosen_model(model_version if checkpoint is None else checkpoint)
    check_model(name)
    if compute_unit is not None:
        from sfumato.coreml.backends import parse_compute_unit

        parse_compute_unit(compute_unit)
    from sfumato.cli.coreml_verify import exit_code, report, table
    from sfumato.cli.drawing import adapter_file
    from sfumato.cli.terminal import Terminal, print_json
    from sfumato.coreml import conversion
    from sfumato.coreml.layout import REQUIRED
    from sfumato.coreml.palettize import read_recipe
    from sfumato.coreml.roles import PARTS
    from sfumato.coreml.source import open_source

    terminal = Terminal(quiet=quiet)
    named = {
        "text_encoder": text_encoder, "unet": unet, "vae_decoder": vae_decoder, "vae_encoder": vae_encoder,
    }  # fmt: skip
    wanted = conversion.ConversionOptions(
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
    adapters = tuple(adapter_file(one, partial=False) for one in lora or ())
    source = open_source(name, variant=variant, adapters=adapters)
    folder, resources = _places(source, wanted, output)
    if bundle:
        check_writable(resources)
    made = _convert(terminal, source, folder, wanted, resume=resume, overwrite=overwrite)
    folders = [folder]
    if bundle:
        folders.append(_bundle(terminal, source, wanted.parts, folder, resources))
    whole = set(REQUIRED) <= set(wanted.parts)
    proofs = [
        report(terminal, place, source, wanted.parts, picture=whole and place == folder) for place in folders if verify
    ]
    if as_json:
        print_json(_summary(made, folders) | {"verifications": [proof.to_dict() for proof in proofs]})
    else:
        for proof in proofs:
            table(proof)
        for place in folders:
            typer.echo(place)
    if code := exit_code(proofs):
        raise typer.Exit(code)


def _places(source: Source, options: ConversionOptions, output: Path | None) -> tuple[Path, Path]:
    """Return the folders for packages and compiled models: side by side as on the hub, or as in Apple's converter."""
    from sfumato.coreml.layout import tree

    if output is not None:
        folder = expanded(output)
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
