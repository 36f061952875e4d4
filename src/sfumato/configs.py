"""Configurations: frozen dataclasses whose field names are the keys of the checkpoint's JSON files.

`parse` turns a JSON mapping into one of them. Keys a class does not know are kept in `extra` (so that a round trip
loses nothing) and handed back to the caller to be reported once; a *value* that is not supported is an error.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from sfumato.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = [
    "AutoencoderKLConfig",
    "AutoencoderTinyConfig",
    "CLIPTextConfig",
    "Config",
    "UNet2DConditionConfig",
    "one_of",
    "parse",
]

C = TypeVar("C", bound="Config")

# Bookkeeping keys that the ecosystem writes beside the real ones; never reported as unknown.
BOOKKEEPING_PREFIX = "_"


@dataclass(frozen=True, kw_only=True)
class Config:
    """A read-only record that is also readable like the mapping it came from (`config["key"]`, `config.get("key")`)."""

    extra: Mapping[str, Any] = field(default_factory=dict, repr=False)
    without_effect: ClassVar[frozenset[str]] = frozenset()  # keys that are known to say nothing about the result

    def to_dict(self) -> dict[str, Any]:
        """Every key and value, unknown ones included, as they would stand in the JSON file (tuples become lists)."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in (own | dict(self.extra)).items()
        }

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def keys(self) -> list[str]:
        """The names of all keys, unknown ones included."""
        return list(self.to_dict())

    def items(self) -> list[tuple[str, Any]]:
        """All keys with their values."""
        return list(self.to_dict().items())

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or `default` where there is none."""
        return self.to_dict().get(key, default)

    def __getitem__(self, key: str) -> Any:
        return self.to_dict()[key]

    def __contains__(self, key: object) -> bool:
        return key in self.to_dict()

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_dict())

    def __len__(self) -> int:
        return len(self.to_dict())

    def __getattr__(self, name: str) -> Any:
        # Only reached for names that are not fields: a foreign key that travelled along.
        extra = self.__dict__.get("extra", {})
        if name in extra:
            return extra[name]
        raise AttributeError(f"{type(self).__name__} has no key {name!r}")


def parse(cls: type[C], mapping: Mapping[str, Any]) -> tuple[C, list[str]]:
    """Read a JSON mapping into a config class.

    Returns the config and the names of the keys it does not know. Lists become tuples, so that configs hash and
    compare. Raises `ConfigError` from the class's own checks.
    """
    names = {f.name for f in dataclasses.fields(cls)} - {"extra"}
    frozen = {key: _freeze(value) for key, value in mapping.items()}
    known = {key: value for key, value in frozen.items() if key in names}
    unknown = {key: value for key, value in frozen.items() if key not in names}
    config = cls(**known, extra=unknown)
    return config, [key for key in unknown if not key.startswith(BOOKKEEPING_PREFIX) and key not in cls.without_effect]


def one_of(owner: str, key: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise `ConfigError` unless the value is among the allowed ones."""
    if value not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise ConfigError(f"{owner}: {key} = {value!r} is not supported; supported values are {choices}")


def _freeze(value: Any) -> Any:
    return tuple(_freeze(item) for item in value) if isinstance(value, list) else value


def _per_block(value: Any, blocks: int) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple) else (value,) * blocks


ACTIVATIONS = ("silu", "swish", "mish", "gelu", "relu")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig(Config):
    """`text_encoder/config.json` of a `CLIPTextModel`; the defaults are the ecosystem's, not those of one model."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    bos_token_id: int | None = 49406
    eos_token_id: int | None = 49407
    pad_token_id: int | None = 1
    without_effect = frozenset(
        ("architectures", "attention_dropout", "dropout", "dtype", "gradient_checkpointing", "initializer_factor",
         "initializer_range", "model_type", "torch_dtype", "transformers_version", "use_cache")
    )  # fmt: skip

    def __post_init__(self) -> None:
        one_of("text_encoder/config.json", "hidden_act", self.hidden_act, ("quick_gelu", "gelu"))
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"text_encoder/config.json: hidden_size = {self.hidden_size} is not divisible by "
                f"num_attention_heads = {self.num_attention_heads}"
            )


@dataclass(frozen=True, kw_only=True)
class UNet2DConditionConfig(Config):
    """`unet/config.json` of a `UNet2DConditionModel`.

    `attention_head_dim` is, for historical reasons, the *number* of heads of each block.
    """

    sample_size: int | tuple[int, ...] | None = None
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1.0
    dropout: float = 0.0
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    dual_cross_attention: bool = False
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    class_embeddings_concat: bool = False
    upcast_attention: bool = False
    resnet_time_scale_shift: str = "default"
    time_embedding_dim: int | None = None
    time_cond_proj_dim: int | None = None
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3
    mid_block_only_cross_attention: bool | None = None
    # What follows is read only to be refused: other values mean layers that Stable Diffusion 1.x and 2.x do not have.
    encoder_hid_dim: int | None = None
    encoder_hid_dim_type: str | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    addition_embed_type_num_heads: int = 64
    resnet_skip_time_act: bool = False
    resnet_out_scale_factor: float = 1.0
    time_embedding_type: str = "positional"
    time_embedding_act_fn: str | None = None
    timestep_post_act: str | None = None
    attention_type: str = "default"
    cross_attention_norm: str | None = None
    reverse_transformer_layers_per_block: tuple[Any, ...] | None = None

    def __post_init__(self) -> None:
        where = "unet/config.json"
        for kind in self.down_block_types:
            one_of(where, "down_block_types", kind, ("DownBlock2D", "CrossAttnDownBlock2D"))
        for kind in self.up_block_types:
            one_of(where, "up_block_types", kind, ("UpBlock2D", "CrossAttnUpBlock2D"))
        one_of(where, "mid_block_type", self.mid_block_type, ("UNetMidBlock2DCrossAttn", None))
        one_of(where, "act_fn", self.act_fn, ACTIVATIONS)
        one_of(where, "resnet_time_scale_shift", self.resnet_time_scale_shift, ("default", "scale_shift"))
        kinds = (None, "timestep", "identity", "projection", "simple_projection")
        one_of(where, "class_embed_type", self.class_embed_type, kinds)
        for key, only in _ONLY_VALUE.items():
            one_of(where, key, getattr(self, key), (only,))
        blocks = len(self.block_out_channels)
        for key in ("down_block_types", "up_block_types", *_PER_BLOCK):
            value = getattr(self, key)
            if isinstance(value, tuple) and len(value) != blocks:
                raise ConfigError(
                    f"{where}: {key} has {len(value)} entries, but block_out_channels has {blocks}; they must agree"
                )
        if self.class_embed_type in ("projection", "simple_projection") and not (
            self.projection_class_embeddings_input_dim
        ):
            raise ConfigError(f"{where}: class_embed_type needs projection_class_embeddings_input_dim")
        if any(value < 1 for value in self.heads):
            raise ConfigError(f"{where}: attention_head_dim (the number of heads) must be at least 1")

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of each down block."""
        counts = self.num_attention_heads if self.num_attention_heads is not None else self.attention_head_dim
        return _per_block(counts, len(self.block_out_channels))

    def per_block(self, key: str) -> tuple[Any, ...]:
        """The values of a key that may be given once or once per down block."""
        return _per_block(getattr(self, key), len(self.block_out_channels))


_PER_BLOCK = (
    "only_cross_attention",
    "layers_per_block",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "attention_head_dim",
    "num_attention_heads",
)
_ONLY_VALUE: dict[str, Any] = {
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "addition_embed_type": None,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "attention_type": "default",
    "cross_attention_norm": None,
    "reverse_transformer_layers_per_block": None,
}


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

    def __post_init__(self) -> None:
        where = "vae/config.json"
        for kind in self.down_block_types:
            one_of(where, "down_block_types", kind, ("DownEncoderBlock2D",))
        for kind in self.up_block_types:
            one_of(where, "up_block_types", kind, ("UpDecoderBlock2D",))
        one_of(where, "act_fn", self.act_fn, ACTIVATIONS)
        for key in ("latents_mean", "latents_std"):
            one_of(where, key, getattr(self, key), (None,))
        counts = {len(self.block_out_channels), len(self.down_block_types), len(self.up_block_types)}
        if len(counts) > 1:
            raise ConfigError(f"{where}: block_out_channels, down_block_types and up_block_types differ in length")

    @property
    def scale_factor(self) -> int:
        """Pixels per latent pixel, along each side."""
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

    def __post_init__(self) -> None:
        where = "vae/config.json"
        one_of(where, "act_fn", self.act_fn, ACTIVATIONS)
        one_of(where, "upsample_fn", self.upsample_fn, ("nearest",))
        for half in ("encoder", "decoder"):
            channels, counts = getattr(self, f"{half}_block_out_channels"), getattr(self, f"num_{half}_blocks")
            if len(channels) != len(counts):
                raise ConfigError(f"{where}: {half}_block_out_channels and num_{half}_blocks differ in length")

    @property
    def scale_factor(self) -> int:
        """Pixels per latent pixel, along each side."""
        return self.upsampling_scaling_factor ** (len(self.decoder_block_out_channels) - 1)
