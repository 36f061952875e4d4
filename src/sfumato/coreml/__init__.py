"""Core ML on any system: convert, verify, run and generate. Names are loaded on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfumato.coreml.conversion import ConversionOptions, convert
    from sfumato.coreml.pipeline import CoreMLPipeline, load_pipeline
    from sfumato.coreml.runtime import load
    from sfumato.coreml.source import open_source
    from sfumato.coreml.verification import verify

__all__ = ["ConversionOptions", "CoreMLPipeline", "convert", "load", "load_pipeline", "open_source", "verify"]

_HOME = {
    "ConversionOptions": "conversion",
    "CoreMLPipeline": "pipeline",
    "convert": "conversion",
    "load": "runtime",
    "load_pipeline": "pipeline",
    "open_source": "source",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sfumato.coreml' has no attribute {name!r}")
    return getattr(import_module(f"sfumato.coreml.{_HOME[name]}"), name)
