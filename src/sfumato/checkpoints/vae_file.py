"""VAEs in a file of their own: the usual kind in both layouts, and tiny autoencoders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sfumato.checkpoints.detect import TINY, VAE, Detected, FilePart, detect, kind_of
from sfumato.checkpoints.single_file import SingleFile, file_header
from sfumato.errors import CheckpointError
from sfumato.families import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from sfumato.checkpoints.headers import Header, Stored

__all__ = ["is_tiny", "open_vae_file"]


def open_vae_file(name: str | PathLike[str], *, use_safetensors: bool | None = None, **hub: Any) -> SingleFile:
    """Find a VAE's file and detect its config, without reading any weights.

    name: a path, a hub id followed by a file name, or a hub URL. Raises `CheckpointError` if the file is something
    else, and says what.
    """
    header = file_header(name, use_safetensors, hub)
    kind = kind_of(header.tensors)
    if kind == TINY:
        return SingleFile(header.path, header, _tiny(header))
    if kind != VAE:
        raise CheckpointError(f"{header.path} is {kind}, not a VAE; give a file with a VAE")
    found = detect(header, family=next(iter(FAMILIES.values())), vae=True)
    if "unet" in found.parts:
        raise CheckpointError(f"{header.path} is a whole checkpoint, not a VAE; give a file with nothing but a VAE")
    return SingleFile(header.path, header, found)


def is_tiny(file: SingleFile) -> bool:
    """Return whether the VAE in a file is a tiny autoencoder."""
    return "decoder_block_out_channels" in file.config("vae")


def _tiny(header: Header) -> Detected:
    stored = header.tensors
    if "encoder.layers.0.weight" not in stored:
        raise CheckpointError(
            f"{header.path} has only the decoder of a tiny autoencoder; get the file with both halves"
        )
    try:
        config = _halves(stored)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"{header.path}: its tiny autoencoder has an unknown shape ({error})") from error
    size, numbers = sum(one.bytes for one in stored.values()), sum(one.count for one in stored.values())
    dtype = max((one.dtype for one in stored.values()), key=[one.dtype for one in stored.values()].count)
    part = FilePart("", "ours", config, numbers, size, dtype, names=())
    family = next(iter(FAMILIES.values()))
    return Detected(family=family, parts={"vae": part}, scheduler={}, steps=0, reasons=("a tiny autoencoder",))


def _halves(stored: Mapping[str, Stored]) -> dict[str, Any]:
    """Return the config that the shapes tell: blocks between convolutions, of which all but the outer lack a bias."""
    encoder, decoder = (_stages(stored, f"{half}.layers") for half in ("encoder", "decoder"))
    return {
        "encoder_block_out_channels": [width for width, _ in encoder[:-1]],
        "num_encoder_blocks": [blocks for _, blocks in encoder[:-1]],
        "decoder_block_out_channels": [width for width, _ in decoder[:-1]],
        "num_decoder_blocks": [blocks for _, blocks in decoder[:-1]],
        "block_out_channels": [width for width, _ in encoder[:-1]],
        "in_channels": stored["encoder.layers.0.weight"].shape[1],
        "latent_channels": stored["decoder.layers.0.weight"].shape[1],
        "out_channels": decoder[-1][0],
    }


def _stages(stored: Mapping[str, Stored], prefix: str) -> list[tuple[int, int]]:
    """Return the output channels of each convolution outside of blocks, and the number of blocks after it."""
    last = max(int(name.removeprefix(f"{prefix}.").partition(".")[0]) for name in stored if name.startswith(prefix))
    blocks = {number for number in range(last + 1) if f"{prefix}.{number}.conv.0.weight" in stored}
    convolutions = [number for number in range(last + 1) if f"{prefix}.{number}.weight" in stored]
    # An activation follows the decoder's first convolution, and enlarging precedes the others: numbers without weights.
    bounds = [*convolutions[1:], last + 1]
    return [
        (stored[f"{prefix}.{one}.weight"].shape[0], sum(one < number < end for number in blocks))
        for one, end in zip(convolutions, bounds, strict=True)
    ]
