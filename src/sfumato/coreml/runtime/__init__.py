"""The portable runtime: runs ML Programs with torch on any system."""

from __future__ import annotations

from sfumato.coreml.runtime.executor import Visit
from sfumato.coreml.runtime.predictor import Precision, Predictor, load

__all__ = ["Precision", "Predictor", "Visit", "load"]
