"""Another VAE for a checkpoint, as a request names it: finding it, its size, and putting it in the place of its own."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from sfumato.checkpoints.builtin import builtin_path
from sfumato.checkpoints.locate import locate_folder
from sfumato.checkpoints.locate_file import is_single_file
from sfumato.checkpoints.vae_file import is_tiny, open_vae_file
from sfumato.errors import CheckpointError, UsageError
from sfumato.models import AutoencoderKL, AutoencoderTiny
from sfumato.models.base import select_model_files
from sfumato.pipelines.fingerprint import fingerprint
from sfumato.pipelines.source import OneNetwork

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sfumato.pipelines.parts import Parts
    from sfumato.pipelines.place import Place
    from sfumato.request import GenerateRequest
    from sfumato.runtime.choices import Sizes

__all__ = ["open_vae", "with_vae", "with_vae_size"]

CLASSES: dict[str, Any] = {cls.__name__: cls for cls in (AutoencoderKL, AutoencoderTiny)}


def open_vae(name: str, *, local_files_only: bool = True) -> OneNetwork:
    """Find a VAE by folder, file or hub id. Reads no weights, and by default downloads nothing.

    Raises `CheckpointError` if it is not a VAE, with a description of what it is instead.
    """
    hub = {"local_files_only": local_files_only}
    if is_single_file(builtin_path(name)):
        file = open_vae_file(name, **hub)
        return OneNetwork(file.path, AutoencoderTiny if is_tiny(file) else AutoencoderKL, file)

    def select(names: Sequence[str], strict: bool) -> list[str]:
        if "model_index.json" in names:
            raise CheckpointError(f"{name} is a whole checkpoint, not a VAE; give a VAE, such as the folder vae in it")
        return select_model_files(names, "", AutoencoderKL.weights_name, strict=strict)

    folder = locate_folder(name, select, **hub)
    whole, other = "give a VAE, such as its folder vae", f"give an {' or an '.join(CLASSES)}"
    return OneNetwork.in_folder(folder, CLASSES, name, "a VAE", whole=whole, other=other)


def with_vae_size(sizes: Sizes, name: str | None) -> Sizes:
    """Put the size of this VAE in the place of the checkpoint's own. Raises the errors of `open_vae` and `with_vae`."""
    if name is None:
        return sizes
    source = open_vae(name)
    config = source.config
    _check(config, sizes.vae_config, name, stated=source.file is None)
    return dataclasses.replace(sizes, vae=source.size, vae_config=config)


def with_vae(parts: Parts, place: Place, request: GenerateRequest) -> tuple[Parts, GenerateRequest]:
    """Put the VAE of a request in the place of the checkpoint's own, and its hash into the request.

    It stays loaded for the next request. Raises `CheckpointError` if it is not a VAE, and `UsageError` if it was made
    for other latents or its weights differ from the recipe's.
    """
    if request.vae is None:
        place.vae = None
        return parts, request
    source = open_vae(request.vae)
    key = (source.place, source.place.stat().st_mtime_ns, parts.vae.dtype)
    if place.vae is None or place.vae[0] != key:
        _check(source.config, parts.vae.config, request.vae, stated=source.file is None)
        later = place.may_reload and place.home is not None and place.home.type == "cpu"
        vae = source.load(parts.vae.dtype, later=later)
        place.vae = key, vae if place.home is not None else vae.to(place.device_of(parts))
    vae = place.vae[1]
    if request.vae_weights not in (None, weights := fingerprint(vae)):
        raise UsageError(f"the weights of {request.vae} differ from the recipe's; restore the original file")
    return dataclasses.replace(parts, vae=vae), request.replace(vae_weights=weights)


def _check(its: Any, own: Any, name: str, *, stated: bool) -> None:
    """Raise `UsageError` unless a VAE has the latents of the checkpoint's own. stated: whether it tells the scale."""
    kinds = {"latent_channels": "channels", "scale_factor": "pixels per side"}
    for key, words in kinds.items():
        if getattr(its, key) != getattr(own, key):
            raise UsageError(
                f"{name} was made for latents of {getattr(its, key)} {words}, but this checkpoint has "
                f"{getattr(own, key)}; give a VAE of the same family"
            )
    # The scale of a tiny autoencoder is 1: it reads latents as the U-Net leaves them.
    if stated and hasattr(its, "sample_size") and its.scaling_factor != own.scaling_factor and own.scaling_factor != 1:
        raise UsageError(
            f"{name} was made for latents of scale {its.scaling_factor:g}, but this checkpoint has "
            f"{own.scaling_factor:g}; give a VAE of the same family"
        )
