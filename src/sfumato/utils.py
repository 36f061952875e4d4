"""Small helpers for scripts and notebooks."""

from sfumato.images import make_image_grid

__all__ = ["make_image_grid"]
