"""The parts of a request that steer an image by something other than words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from sfumato.errors import UsageError
from sfumato.request.records import Record, Share, Weight, check_word
from sfumato.values import Within

__all__ = ["FITS", "MODES", "MODE_OF", "PREPROCESSORS", "Control", "Controls", "ImagePrompt", "ImagePrompts"]

# What can be made of a photo for a network to read, and how a picture of another shape is fitted.
PREPROCESSORS = (
    "none", "canny", "scribble", "lineart", "softedge", "tile", "invert", "blur", "threshold", "recolor",
)  # fmt: skip
FITS = ("crop", "pad", "stretch")
# What a ControlNet Union calls its kinds of pictures, by their numbers; and those of what can be made of a photo.
MODES = ("openpose", "depth", "softedge", "canny", "normal", "segment", "tile", "inpaint")
MODE_OF = {"scribble": "softedge", "lineart": "canny"} | {name: name for name in MODES if name in PREPROCESSORS}


@dataclass(frozen=True, kw_only=True)
class Control(Record):
    """A picture that steers what is drawn where, and the network that reads it, such as a ControlNet.

    model         the network: a folder, a safetensors file, or a hub id in the local cache
    image         the picture's file
    preprocessor  what is made of the picture first; "none" if it is what the network reads
    mode          what the picture shows, for a ControlNet Union: "openpose", "depth", "softedge" (or scribble), "canny"
                  (or lines), "normal", "segment", "tile" or "inpaint"; told from the preprocessor if None
    fit           what happens to a picture of another shape than the image's: "crop", "pad" or "stretch"
    scale         how strongly it steers: 0 not at all, 1 as trained
    start, end    the share of the steps at which it begins and ends
    layers        more factors, one for each residual from the first skip connection to the middle
    guess         steer the prompt's half of guidance alone, and the shallow layers less
    weights       what the network's weights must hash to, and sha256 the picture's file; recipes say both
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
    """An image that is read like a prompt, by an IP-Adapter.

    model     the adapter's safetensors file
    image     the image's file
    encoder   the folder of CLIP's image encoder that it was trained with
    scale     how strongly it is read: 0 not at all
    mask      an image of where it is read, white for all of it; everywhere if None
    hashes    what model, image, encoder and mask must hash to, in this order; recipes say it
    """

    model: Annotated[str, Within(1, 4096)]
    image: Annotated[str, Within(1, 4096)]
    encoder: Annotated[str, Within(1, 4096)]
    scale: Weight = 1.0
    mask: Annotated[str, Within(1, 4096)] | None = None
    hashes: Annotated[tuple[str, ...], Within(3, 4)] | None = None


ImagePrompts = Annotated[tuple[Annotated[ImagePrompt, "fields of an ImagePrompt"], ...], Within(0, 16)]
Controls = Annotated[tuple[Annotated[Control, "fields of a Control"], ...], Within(0, 16)]
