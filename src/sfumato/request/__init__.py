"""What to generate, as one frozen value: `GenerateRequest` and the records in its fields."""

from sfumato.request.controls import FITS, MODE_OF, MODES, PREPROCESSORS, Control, ImagePrompt
from sfumato.request.details import (
    LARGEST_SEEDS,
    AdapterFile,
    EmbeddingFile,
    Framing,
    FreeU,
    GuidanceInterval,
    Noise,
)
from sfumato.request.fast import Fast, Reuse
from sfumato.request.generate import MOST_STEPS, SPACINGS, SYNTAXES, GenerateRequest, as_request
from sfumato.request.hires import UPSCALERS, Hires, share_of
from sfumato.request.masks import Mask
from sfumato.request.records import Record

__all__ = [
    "FITS",
    "LARGEST_SEEDS",
    "MODES",
    "MODE_OF",
    "MOST_STEPS",
    "PREPROCESSORS",
    "SPACINGS",
    "SYNTAXES",
    "UPSCALERS",
    "AdapterFile",
    "Control",
    "EmbeddingFile",
    "Fast",
    "Framing",
    "FreeU",
    "GenerateRequest",
    "GuidanceInterval",
    "Hires",
    "ImagePrompt",
    "Mask",
    "Noise",
    "Record",
    "Reuse",
    "as_request",
    "share_of",
]
