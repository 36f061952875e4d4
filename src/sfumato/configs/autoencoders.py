"""`config.json` of autoencoders."""

from __future__ import annotations

from dataclasses import dataclass

from sfumato.configs.checks import ACTIVATIONS, MOST_BLOCKS, check_count, check_divisible
from sfumato.configs.config import Config, one_of
from sfumato.errors import ConfigError
from sfumato.values import Within

__all__ = ["AutoencoderKLConfig", "AutoencoderTinyConfig"]


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLConfig(Config):
    """`vae/config.json` of an `AutoencoderKL`."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    where = "vae/config.json"
    bounds = {"layers_per_block": Within(1, 64), "scaling_factor": Within(1e-9, 1e9)}

    def _check(self) -> None:
        where = self.where
        for kind in self.down_block_types:
            one_of(where, "down_block_types", kind, ("DownEncoderBlock2D",))
        for kind in self.up_block_types:
            one_of(where, "up_block_types", kind, ("UpDecoderBlock2D",))
        one_of(where, "act_fn", self.act_fn, ACTIVATIONS)
        for key in ("latents_mean", "latents_std"):
            value = getattr(self, key)
            if value is not None and len(value) != self.latent_channels:
                raise ConfigError(f"{where}: {key} has {len(value)} entries for {self.latent_channels} latent channels")
        if (self.latents_mean is None) != (self.latents_std is None):
            raise ConfigError(f"{where}: latents_mean and latents_std must be given together, but one is missing")
        counts = {len(self.block_out_channels), len(self.down_block_types), len(self.up_block_types)}
        if len(counts) > 1:
            raise ConfigError(f"{where}: block_out_channels, down_block_types and up_block_types differ in length")
        blocks = len(self.block_out_channels)
        check_count(where, "block_out_channels", blocks, MOST_BLOCKS)
        check_divisible(where, self.block_out_channels, "norm_num_groups", (self.norm_num_groups,) * blocks)

    @property
    def scale_factor(self) -> int:
        """Image pixels per latent pixel, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True, kw_only=True)
class AutoencoderTinyConfig(Config):
    """`vae/config.json` of an `AutoencoderTiny` (the TAESD family)."""

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    act_fn: str = "relu"
    upsample_fn: str = "nearest"
    latent_channels: int = 4
    upsampling_scaling_factor: int = 2
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_magnitude: float = 3
    latent_shift: float = 0.5
    force_upcast: bool = False
    scaling_factor: float = 1.0
    shift_factor: float | None = 0.0
    block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    where = "vae/config.json"
    bounds = {
        "upsampling_scaling_factor": Within(1, 16), "latent_magnitude": Within(1e-9, 1e9),
        "num_encoder_blocks": Within(0, 64), "num_decoder_blocks": Within(0, 64), "scaling_factor": Within(1e-9, 1e9),
    }  # fmt: skip

    def _check(self) -> None:
        where = self.where
        one_of(where, "act_fn", self.act_fn, ACTIVATIONS)
        one_of(where, "upsample_fn", self.upsample_fn, ("nearest",))
        for half in ("encoder", "decoder"):
            channels, counts = getattr(self, f"{half}_block_out_channels"), getattr(self, f"num_{half}_blocks")
            if len(channels) != len(counts):
                raise ConfigError(f"{where}: {half}_block_out_channels and num_{half}_blocks differ in length")
            check_count(where, f"num_{half}_blocks", len(counts), MOST_BLOCKS)

    @property
    def scale_factor(self) -> int:
        """Image pixels per latent pixel, along each side."""
        return self.upsampling_scaling_factor ** (len(self.decoder_block_out_channels) - 1)
