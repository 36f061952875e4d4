"""`--control` and `--controlnet`: control images and the networks that read them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from sfumato.errors import UsageError, suggest
from sfumato.files import expanded
from sfumato.request import MODES, PREPROCESSORS, Control, ImagePrompt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sfumato.request import GenerateRequest

__all__ = ["controls", "fetch_networks", "image_prompts"]

FORM = "--control takes KIND:IMAGE[:SCALE[:START[:END]]]"


def controls(pictures: Sequence[str], networks: Sequence[str], fit: str) -> tuple[Control, ...]:
    """Parse the options, pairing the first image with the first network. A single network is used for all images.

    Raises `UsageError` if the numbers do not match.
    """
    pairs = _pairs(pictures, networks, ("--control", "--controlnet"))
    return tuple(_control(text, network, fit) for text, network in pairs)


def image_prompts(images: Sequence[str], adapters: Sequence[str], encoder: str | None) -> tuple[ImagePrompt, ...]:
    """Parse the same for image prompts, which also need an encoder."""
    pairs = _pairs(images, adapters, ("--image-prompt", "--ip-adapter"))
    if (encoder is None) != (not pairs):
        raise UsageError("--ip-adapter and --image-encoder go together; give both, or neither")
    made = []
    for text, adapter in pairs:
        image, numbers = _split(text, 1, "--image-prompt takes IMAGE[:SCALE]")
        made.append(ImagePrompt(model=adapter, image=image, encoder=str(encoder), scale=(*numbers, 1.0)[0]))
    return tuple(made)


def _pairs(pictures: Sequence[str], networks: Sequence[str], names: tuple[str, str]) -> list[tuple[str, str]]:
    if len(networks) == 1 and pictures:
        networks = [*networks] * len(pictures)
    if len(pictures) != len(networks):
        raise UsageError(
            f"got {len(pictures)} {names[0]} and {len(networks)} {names[1]}; give one network for each image, "
            "or one for all"
        )
    return list(zip(pictures, networks, strict=True))


def _control(text: str, network: str, fit: str) -> Control:
    kind, colon, rest = text.partition(":")
    kinds = tuple(dict.fromkeys((*PREPROCESSORS, *MODES)))
    if not colon or kind not in kinds:
        raise UsageError(f"{FORM}, and there is no kind {kind!r}{suggest(kind, kinds)}; kinds are {', '.join(kinds)}")
    made, mode = (kind, None) if kind in PREPROCESSORS else ("none", kind)
    image, numbers = _split(rest, 3, FORM)
    named = dict(zip(("scale", "start", "end"), numbers, strict=False))
    return Control(model=network, image=image, preprocessor=made, mode=mode, fit=fit, **named)


def _split(text: str, most: int, form: str) -> tuple[str, list[float]]:
    """Split a file from up to `most` numbers after it."""
    image, numbers = text, []
    while len(numbers) < most and not os.path.exists(expanded(image)) and ":" in image[2:]:  # a drive letter
        image, _, number = image.rpartition(":")
        try:
            numbers.insert(0, float(number))
        except ValueError as error:
            raise UsageError(f"{form}, and {number!r} is not a number") from error
    return image, numbers


def fetch_networks(request: GenerateRequest) -> None:
    """Download the control networks and the VAE of a request that are not on this machine yet.

    Raises `CheckpointError` if one is something else.
    """
    if request.controls:
        from sfumato.pipelines.controlling import open_control

        for name in dict.fromkeys(control.model for control in request.controls):
            open_control(name, local_files_only=False)
    if request.vae is not None:
        from sfumato.pipelines.vaes import open_vae

        open_vae(request.vae, local_files_only=False)
