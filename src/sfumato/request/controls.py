"""The parts of a request that steer an image by something other than words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from sfumato.errors import UsageError
from sfumato.request.records import Record, Share, Weight, check_word
from sfumato.values import Within

__all__ = ["FITS", "MODES", "MODE_OF", "PREPROCESSORS", "Control", "Controls", "ImagePrompt", "ImagePrompts"]

# Preprocessors for control images, and ways to fit images with another aspect ratio.
PREPROCESSORS = (
    "none", "canny", "scribble", "lineart", "softedge", "tile", "invert", "blur", "threshold", "recolor",
)  # fmt: skip
FITS = ("crop", "pad", "stretch")
# A ControlNet Union's kinds of control images, in the order of their numbers; and the kind for each preprocessor.
MODES = ("openpose", "depth", "softedge", "canny", "normal", "segment", "tile", "inpaint")
MODE_OF = {"scribble": "softedge", "lineart": "canny"} | {name: name for name in MODES if name in PREPROCESSORS}


@dataclass(frozen=True, kw_only=True)
class Control(Record):
    """A control image that guides the composition, and the network that reads it, such as a ControlNet.

    model         the network: a folder, a safetensors file, or a hub id in the local cache
    image         the control image's file
    preprocessor  how to preprocess the image; "none" if it is already what the network expects
    mode          the kind of image, for a ControlNet Union: "openpose", "depth", "softedge" (or scribble), "canny" (or
                  lines), "normal", "segment", "tile" or "inpaint"; if None, derived from the preprocessor
    fit           how to fit an image with another aspect ratio: "crop", "pad" or "stretch"
    scale         the strength of the control: 0 is off, 1 is as trained
    start, end    the fractions of the steps between which it is active
    layers        additional factors, one for each residual from the first skip connection to the middle
    guess         guess mode: affects only the prompt's branch of guidance, and shallow layers less
    weights, sha256  the required hashes of the network's weights and of the image file, as recorded in recipes
    """

    model: Annotated[str, Within(1, 4096)]
    image: Annotated[str, Within(1, 4096)]
    preprocessor: str = "none"
    mode: str | None = None
    fit: Annotated[str, "crop, pad or stretch"] = "crop"
    scale: Weight = 1.0
    start: Share = 0.0
    end: Share = 1.0
    layers: Annotated[tuple[Weight, ...], Within(1, 100)] | None = None
    guess: bool = False
    weights: Annotated[str, Within(32, 32)] | None = None
    sha256: Annotated[str, Within(64, 64)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_word("preprocessor", self.preprocessor, PREPROCESSORS)
        check_word("fit", self.fit, FITS)
        check_word("mode", self.mode or MODES[0], MODES)
        if self.start >= self.end:
            raise UsageError(f"a control's start, {self.start:g}, must be below its end, {self.end:g}")


@dataclass(frozen=True, kw_only=True)
class ImagePrompt(Record):
    """An image to use like a prompt, with an IP-Adapter.

    model     the adapter's safetensors file
    image     the image file
    encoder   the folder of the CLIP image encoder that the adapter was trained with
    scale     the strength of the image: 0 is off
    mask      an image that is white where the image prompt applies; None for everywhere
    hashes    the required hashes of model, image, encoder and mask, in this order, as recorded in recipes
    """

    model: Annotated[str, Within(1, 4096)]
    image: Annotated[str, Within(1, 4096)]
    encoder: Annotated[str, Within(1, 4096)]
    scale: Weight = 1.0
    mask: Annotated[str, Within(1, 4096)] | None = None
    hashes: Annotated[tuple[str, ...], Within(3, 4)] | None = None


ImagePrompts = Annotated[tuple[Annotated[ImagePrompt, "fields of an ImagePrompt"], ...], Within(0, 16)]
Controls = Annotated[tuple[Annotated[Control, "fields of a Control"], ...], Within(0, 16)]
