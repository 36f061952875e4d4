"""Converts images between PIL, arrays and tensors, with the interface of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from sfumato.configs import Config, DPTImageProcessorConfig, parse
from sfumato.ecosystem import absent
from sfumato.errors import UsageError, suggest
from sfumato.files import read_json, write_json
from sfumato.images import from_pixels, to_arrays, to_pictures, to_pixels
from sfumato.masks import crop_region, overlay, read_mask

if TYPE_CHECKING:
    from os import PathLike

__all__ = ["DPTImageProcessor", "VaeImageProcessor"]

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class VaeImageProcessor:
    """Converts images for an autoencoder, and back. `vae_scale_factor`: image pixels per latent pixel, along each side.

    With `do_normalize=False`, tensors are in [0, 1] instead of [-1, 1]; with `do_resize=False`, images keep their size.
    Latents (B, 4, h, w) are passed through unchanged. With `do_convert_grayscale`, it converts masks, to one channel in
    [0, 1], and with `do_binarize` to 0 or 1.
    """

    def __init__(
        self,
        do_resize: bool = True,
        vae_scale_factor: int = 8,
        vae_latent_channels: int = 4,
        do_normalize: bool = True,
        do_binarize: bool = False,
        do_convert_rgb: bool = True,
        do_convert_grayscale: bool = False,
    ) -> None:
        told = {"do_resize": do_resize, "vae_scale_factor": vae_scale_factor, "do_normalize": do_normalize}
        told |= {"vae_latent_channels": vae_latent_channels, "do_convert_rgb": do_convert_rgb}
        told |= {"do_binarize": do_binarize, "do_convert_grayscale": do_convert_grayscale}
        self.config = Config(extra=told)

    def preprocess(self, image: Any, height: int | None = None, width: int | None = None) -> Tensor:
        """Convert an image, array or tensor, or a list of one kind, to (B, 3, H, W) float32.

        PIL images are resized to the given size, or down to multiples of the scale factor. Masks, in any form, become
        (B, 1, H, W).
        """
        factor = self.config.vae_scale_factor if self.config.do_resize else 1
        if self.config.do_convert_grayscale:
            levels = read_mask(image, (width, height) if self.config.do_resize else (None, None), factor)
            return (levels >= 0.5).float() if self.config.do_binarize else levels
        if isinstance(image, Tensor) and image.ndim == 4 and image.shape[1] == self.config.vae_latent_channels:
            return image
        first = image[0] if isinstance(image, (list, tuple)) and image else image
        size = None
        if isinstance(first, Image.Image):
            wide, high = (side or own for side, own in zip((width, height), first.size, strict=True))
            size = (max(factor, wide - wide % factor), max(factor, high - high % factor))
        pixels = to_pixels(image, factor, size)
        return pixels if self.config.do_normalize else self.denormalize(pixels)

    def postprocess(
        self, image: Tensor, output_type: str = "pil", do_denormalize: list[bool] | None = None
    ) -> list[Image.Image] | np.ndarray | Tensor:
        """Convert decoded images (B, 3, H, W) to PIL images, an array (B, H, W, 3) or a tensor in [0, 1].

        "latent" returns them unchanged. do_denormalize: for each image, whether it is in [-1, 1]. Raises `UsageError`.
        """
        if output_type not in OUTPUT_TYPES:
            near = suggest(output_type, OUTPUT_TYPES)
            raise UsageError(f"there is no output_type {output_type!r}{near}; use pil, np, pt or latent")
        if output_type == "latent":
            return image
        wanted = [self.config.do_normalize] * len(image) if do_denormalize is None else do_denormalize
        rows = zip(image, wanted, strict=True)
        pixels = torch.stack([self.denormalize(one) if normalized else one for one, normalized in rows])
        if output_type == "pt":
            return pixels
        return self.pt_to_numpy(pixels) if output_type == "np" else to_pictures(pixels)

    @staticmethod
    def blur(image: Image.Image, blur_factor: int = 4) -> Image.Image:
        """Blur a PIL image or mask, by a Gaussian with this radius in pixels."""
        return image.filter(ImageFilter.GaussianBlur(blur_factor))

    @staticmethod
    def get_crop_region(mask_image: Image.Image, width: int, height: int, pad: int = 0) -> tuple[int, int, int, int]:
        """Return the box of a mask and `pad` pixels around it, in the shape of width × height (`crop_region`)."""
        return crop_region(mask_image, (width, height), pad)

    @staticmethod
    def apply_overlay(
        mask: Image.Image,
        init_image: Image.Image,
        image: Image.Image,
        crop_coords: tuple[int, int, int, int] | None = None,
    ) -> Image.Image:
        """Put a generated image over the original where its mask is white; crop_coords: the part that it shows."""
        return overlay(mask, init_image, image, crop_coords)

    @staticmethod
    def normalize(images: Any) -> Any:
        """Map [0, 1] to [-1, 1]."""
        return 2 * images - 1

    @staticmethod
    def denormalize(images: Tensor) -> Tensor:
        """Map [-1, 1] to [0, 1], clipped."""
        return from_pixels(images)

    @staticmethod
    def numpy_to_pil(images: np.ndarray) -> list[Image.Image]:
        """Convert an array (H, W, C) or (B, H, W, C) in [0, 1] to PIL images."""
        batch = images[None] if images.ndim == 3 else images
        return to_pictures(torch.from_numpy(np.ascontiguousarray(batch)).permute(0, 3, 1, 2))

    @staticmethod
    def pil_to_numpy(images: Image.Image | list[Image.Image]) -> np.ndarray:
        """Convert PIL images to a float32 array (B, H, W, C) in [0, 1]."""
        several = images if isinstance(images, list) else [images]
        return np.stack([np.array(one).astype(np.float32) / 255.0 for one in several])

    @staticmethod
    def numpy_to_pt(images: np.ndarray) -> Tensor:
        """Convert an array (B, H, W) or (B, H, W, C) to a tensor (B, C, H, W)."""
        batch = images[..., None] if images.ndim == 3 else images
        return torch.from_numpy(batch.transpose(0, 3, 1, 2))

    @staticmethod
    def pt_to_numpy(images: Tensor) -> np.ndarray:
        """Convert a tensor (B, C, H, W) to a float32 array (B, H, W, C)."""
        return to_arrays(images)


class DPTImageProcessor:
    """Converts images to a depth estimator's input."""

    settings = "preprocessor_config.json"

    def __init__(self, **values: Any) -> None:
        """values: those of a `DPTImageProcessorConfig`. Raises `ConfigError` for others than are supported."""
        self.config = parse(DPTImageProcessorConfig, values)[0]

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str], subfolder: str = "") -> Self:
        """Read `preprocessor_config.json` in a folder."""
        path = Path(folder) / subfolder / cls.settings
        processor = cls()
        processor.config = parse(DPTImageProcessorConfig, read_json(path), path)[0]
        return processor

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write `preprocessor_config.json` to a folder, which is created."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(Path(folder) / self.settings, self.config.to_dict() | {"image_processor_type": "DPTImageProcessor"})

    def __call__(self, image: Any) -> Tensor:
        """Resize and normalize images in any form that `to_pixels` accepts, to (B, 3, S, S) float32."""
        several = image if isinstance(image, (list, tuple)) else [image]
        if not all(isinstance(one, Image.Image) for one in several):
            pixels = to_pixels(image, 1)
            if pixels.shape[1] != 3:
                raise UsageError("depth cannot be estimated from latents; pass a depth_map, or an image of pixels")
            several = to_pictures(from_pixels(pixels))
        config, rows = self.config, []
        for one in several:
            fitted = one.convert("RGB").resize((config.side, config.side), Image.Resampling(config.resample))
            rows.append(torch.from_numpy(np.asarray(fitted, dtype=np.float32) / 255).permute(2, 0, 1))
        mean, spread = (torch.tensor(values)[:, None, None] for values in (config.image_mean, config.image_std))
        return (torch.stack(rows) - mean) / spread


def __getattr__(name: str) -> Any:
    raise absent("package", name, __name__)
