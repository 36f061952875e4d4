"""The autoencoder's encoder and decoder as ML Programs."""

from __future__ import annotations

from torch import nn

from sfumato.coreml import program
from sfumato.coreml.converter.attention import attention_named
from sfumato.coreml.converter.builder import Builder
from sfumato.coreml.converter.emitter import Handle
from sfumato.coreml.converter.layers import Layers, check_sizes, parts
from sfumato.coreml.converter.targets import DEFAULT_TARGET, target_named
from sfumato.errors import ConfigError
from sfumato.models.tiny_vae import AutoencoderTiny
from sfumato.models.vae import AutoencoderKL, Decoder, Encoder, PixelAttention, VAELevel, VAEMidBlock

__all__ = ["vae_decoder", "vae_encoder"]


def vae_decoder(
    model: AutoencoderKL | AutoencoderTiny,
    *,
    height: int,
    width: int,
    target: str = DEFAULT_TARGET,
    dtype: str = "fp16",
) -> program.Model:
    """Build the program that decodes latents of one size.

    Input, in the program's precision: z (1, C, height, width), divided by the scaling factor; output: image (1, 3,
    f height, f width) in float32, about [-1, 1], f the config's scale factor. Raises `ConfigError` for an
    `AutoencoderTiny`, `UsageError` for sizes below 1 and unknown names.
    """
    layers, vae = _layers(model, height, width, target, dtype)
    b, decoder = layers.builder, vae.decoder
    z = b.input("z", dtype, (1, vae.config.latent_channels, height, width), "Latents, divided by the scaling factor")
    if isinstance(vae.post_quant_conv, nn.Conv2d):
        z = layers.conv(vae.post_quant_conv, z)
    x = _middle(layers, decoder.mid_block, layers.conv(decoder.conv_in, z))
    for level in parts(decoder.up_blocks):
        x = _level(layers, level, x)
    x = _out(layers, decoder, x)
    b.result(x, "image", "The image: red, green and blue from -1 to 1")
    return b.model("Stable Diffusion: decodes latents to an image")


def vae_encoder(
    model: AutoencoderKL | AutoencoderTiny,
    *,
    height: int,
    width: int,
    target: str = DEFAULT_TARGET,
    dtype: str = "fp16",
) -> program.Model:
    """Build the program that encodes images to latents of one size.

    Input, in the program's precision: x (1, 3, f height, f width) in [-1, 1], f the config's scale factor; output:
    latent (1, 2 C, height, width) in float32, the means and then the log variances. Raises the same errors as
    `vae_decoder`.
    """
    layers, vae = _layers(model, height, width, target, dtype)
    b, encoder, factor = layers.builder, vae.encoder, vae.config.scale_factor
    shape = (1, vae.config.in_channels, factor * height, factor * width)
    x = layers.conv(encoder.conv_in, b.input("x", dtype, shape, "An image: red, green and blue from -1 to 1"))
    for level in parts(encoder.down_blocks):
        x = _level(layers, level, x)
    x = _out(layers, encoder, _middle(layers, encoder.mid_block, x))
    if isinstance(vae.quant_conv, nn.Conv2d):
        x = layers.conv(vae.quant_conv, x)
    b.result(x, "latent", "Means and logarithms of variances of the latents, not yet scaled")
    return b.model("Stable Diffusion: encodes an image to latents")


def _layers(
    model: AutoencoderKL | AutoencoderTiny, height: int, width: int, target: str, dtype: str
) -> tuple[Layers, AutoencoderKL]:
    if not isinstance(model, AutoencoderKL):
        raise ConfigError(
            f"an {type(model).__name__} cannot be converted to Core ML; use a checkpoint with an AutoencoderKL"
        )
    check_sizes(height=height, width=width)
    # A single head over few pixels: splitting it would only add operations.
    return Layers(Builder(target_named(target), dtype), model, attention_named("original"), far=True), model


def _middle(layers: Layers, block: VAEMidBlock, x: Handle) -> Handle:
    first, second = parts(block.resnets)
    x = layers.resnet(first, x)
    for attention in parts(block.attentions):
        x = _pixel_attention(layers, attention, x)
    return layers.resnet(second, x)


def _pixel_attention(layers: Layers, module: PixelAttention, x: Handle) -> Handle:
    b, (batch, channels, height, width) = layers.builder, x.shape
    with b.scope(layers.path(module)):
        tokens = b.reshape(layers.group_norm(module.group_norm, x), (batch, channels, 1, height * width))
        return b.add(x, b.reshape(layers.attention(module, tokens), x.shape))


def _level(layers: Layers, level: VAELevel, x: Handle) -> Handle:
    for resnet in parts(level.resnets):
        x = layers.resnet(resnet, x)
    for resize in parts(getattr(level, "downsamplers", None)):
        x = layers.downsample(resize, x)
    for resize in parts(getattr(level, "upsamplers", None)):
        x = layers.upsample(resize, x)
    return x


def _out(layers: Layers, half: Encoder | Decoder, x: Handle) -> Handle:
    with layers.builder.scope(layers.path(half)):
        return layers.conv(half.conv_out, layers.activation(half.conv_act, layers.group_norm(half.conv_norm_out, x)))
