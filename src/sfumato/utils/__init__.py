"""Small helpers for scripts and notebooks, under the ecosystem's names."""

from __future__ import annotations

from typing import Any

from sfumato.ecosystem import absent
from sfumato.images import make_image_grid
from sfumato.outputs import Output as BaseOutput
from sfumato.utils.files import export_to_gif, load_image
from sfumato.utils.logging import get_logger
from sfumato.utils.tensors import numpy_to_pil, pt_to_pil

__all__ = ["BaseOutput", "export_to_gif", "get_logger", "load_image", "make_image_grid", "numpy_to_pil", "pt_to_pil"]


def __getattr__(name: str) -> Any:
    raise absent("utils", name, __name__)
