"""Scales latents between the autoencoder's range and the denoiser's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["Scaled"]


class Scaled:
    """An autoencoder whose config defines the mean and scale of its latents, as one number or per channel."""

    config: Any
    # Whether the scale is a guess: a separate autoencoder file does not contain it.
    scale_assumed = False

    def assume_scale(self, values: Mapping[str, Any]) -> None:
        """Take the scale from a family's config if it is only a guess: it depends on the U-Net, not on the file."""
        if self.scale_assumed:
            names = ("scaling_factor", "latents_mean", "latents_std")
            self.config, self.scale_assumed = self.config.replace(**{key: values.get(key) for key in names}), False

    def scaled(self, latents: Tensor) -> Tensor:
        """Scale latents (B, C, h, w) from the encoder for denoising."""
        config, (mean, std) = self.config, self._statistics(latents)
        latents = latents - (config.shift_factor or 0.0)
        return latents * config.scaling_factor if mean is None else (latents - mean) * config.scaling_factor / std

    def unscaled(self, latents: Tensor) -> Tensor:
        """The inverse of `scaled`: latents for the decoder."""
        config, (mean, std) = self.config, self._statistics(latents)
        latents = latents / config.scaling_factor if mean is None else latents * std / config.scaling_factor + mean
        return latents + (config.shift_factor or 0.0)

    def _statistics(self, latents: Tensor) -> tuple[Any, Any]:
        """Return each channel's mean and standard deviation (C, 1, 1), or None for both if unknown."""
        mean, std = self.config.get("latents_mean"), self.config.get("latents_std")
        if mean is None or std is None:
            return None, None
        return latents.new_tensor(mean)[:, None, None], latents.new_tensor(std)[:, None, None]
