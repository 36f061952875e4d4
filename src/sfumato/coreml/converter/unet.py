"""The conditional U-Net as an ML Program."""

from __future__ import annotations

import math

import torch

from sfumato.configs import UNet2DConditionConfig
from sfumato.coreml import program
from sfumato.coreml.converter.attention import attention_named
from sfumato.coreml.converter.builder import Builder
from sfumato.coreml.converter.emitter import Handle
from sfumato.coreml.converter.layers import Layers, check_sizes, parts
from sfumato.coreml.converter.targets import DEFAULT_TARGET, target_named
from sfumato.errors import ConfigError
from sfumato.models.transformer import BasicTransformerBlock, Transformer2DModel
from sfumato.models.unet import DownBlock, MidBlock, UNet2DConditionModel, UpBlock

__all__ = ["frequencies", "unet"]


def unet(
    model: UNet2DConditionModel,
    *,
    height: int,
    width: int,
    tokens: int,
    batch: int = 2,
    attention: str = "original",
    target: str = DEFAULT_TARGET,
    dtype: str = "fp16",
) -> program.Model:
    """Build the program of a U-Net, for one size of latents and one prompt length.

    Inputs, in the program's precision: sample (B, C, height, width), timestep (B,), encoder_hidden_states (B, C', 1,
    tokens); output: noise_pred (B, C, height, width) in float32. batch: 2 for both halves of guidance at once, or 1;
    attention: a name in `ATTENTIONS`. Raises `ConfigError` for a config that cannot be converted, and `UsageError` for
    sizes below 1 and unknown names.
    """
    check_sizes(height=height, width=width, tokens=tokens, batch=batch)
    config = model.config
    _check(model)
    b = Builder(target_named(target), dtype)
    layers = Layers(b, model, attention_named(attention))
    sample = b.input("sample", dtype, (batch, config.in_channels, height, width), "The noisy latents")
    step = b.input("timestep", dtype, (batch,), "The noise level, as a training timestep")
    shape = (batch, _context_channels(model), 1, tokens)
    context = b.input("encoder_hidden_states", dtype, shape, "The encoded prompts")
    if config.center_input_sample:
        sample = b.sub(b.mul(sample, 2.0), 1.0)
    time = _time(layers, model, step)
    x = layers.conv(model.conv_in, sample)
    skips = [x]
    for block in parts(model.down_blocks):
        x = _down(layers, block, x, time, context, skips)
    if model.mid_block is not None:
        x = _middle(layers, model.mid_block, x, time, context)
    for block in parts(model.up_blocks):
        x = _up(layers, block, x, time, context, skips)
    if model.conv_norm_out is not None:
        with b.scope("conv_act"):
            x = layers.activation(model.conv_act, layers.group_norm(model.conv_norm_out, x))
    b.result(layers.conv(model.conv_out, x), "noise_pred", "The model's prediction: noise, velocity or sample")
    return b.model("Stable Diffusion: predicts the noise in latents, guided by a prompt")


def _check(model: UNet2DConditionModel) -> None:
    """Raise `ConfigError` for models with inputs that the program does not have."""
    config, reason = model.config, "is not supported in Core ML: the program would need another input"
    for key in ("class_embed_type", "num_class_embeds", "time_cond_proj_dim", "addition_embed_type"):
        if config[key] is not None:
            raise ConfigError(f"unet/config.json: {key} = {config[key]!r} {reason}; use torch instead")
    if config.is_k:
        raise ConfigError("unet/config.json: k-diffusion blocks cannot be converted to Core ML; use torch instead")


def _context_channels(model: UNet2DConditionModel) -> int:
    """Return the number of channels of the prompt, which must be the same for every block."""
    widths = set(model.config.per_block("cross_attention_dim"))
    if len(widths) > 1:
        raise ConfigError("unet/config.json: cross_attention_dim must be one number to be converted to Core ML")
    return widths.pop()


def frequencies(config: UNet2DConditionConfig) -> torch.Tensor:
    """Return the factors that turn timesteps into the angles of their embedding: (C // 2,), float32.

    Source: arXiv 2006.11239, appendix B.
    """
    half = config.block_out_channels[0] // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32) / (half - config.freq_shift)
    return torch.exp(exponent)


def _time(layers: Layers, model: UNet2DConditionModel, step: Handle) -> Handle:
    """Timesteps (B,) -> the activated time embedding (B, T, 1, 1).

    Angles are always float32: in float16 they would be off by a third of a radian at timestep 981.
    """
    b, config, embedding = layers.builder, model.config, model.time_embedding
    with b.scope("time_proj"):
        angles = b.mul(b.expand_dims(b.cast(step, "fp32"), (1,)), frequencies(config)[None].numpy())
        parts = [b.unary("cos", angles), b.unary("sin", angles)]
        waves = b.concat(parts if config.flip_sin_to_cos else parts[::-1], 1)
        if config.block_out_channels[0] % 2:
            waves = b.pad(waves, ((0, 0), (0, 1)))
        x = b.expand_dims(b.cast(waves, b.dtype), (2, 3))
    x = layers.conv(embedding.linear_1, x)
    with b.scope(layers.path(embedding)):
        x = layers.activation(embedding.act, x)
    x = layers.conv(embedding.linear_2, x)
    with b.scope("time_act"):
        return layers.activation(model.conv_act, x)


def _down(layers: Layers, block: DownBlock, x: Handle, time: Handle, context: Handle, skips: list[Handle]) -> Handle:
    """Apply a down block; every intermediate result is appended to the skip connections."""
    transformers = parts(block.attentions)
    for i, resnet in enumerate(parts(block.resnets)):
        x = layers.resnet(resnet, x, time)
        x = _transformer(layers, transformers[i], x, context) if transformers else x
        skips.append(x)
    for downsampler in parts(block.downsamplers):
        x = layers.downsample(downsampler, x)
        skips.append(x)
    return x


def _middle(layers: Layers, block: MidBlock, x: Handle, time: Handle, context: Handle) -> Handle:
    first, *rest = parts(block.resnets)
    x = layers.resnet(first, x, time)
    for transformer in parts(block.attentions):
        x = _transformer(layers, transformer, x, context)
    for resnet in rest:
        x = layers.resnet(resnet, x, time)
    return x


def _up(layers: Layers, block: UpBlock, x: Handle, time: Handle, context: Handle, skips: list[Handle]) -> Handle:
    """Apply an up block; its skip connections are popped from the end of the list."""
    b, transformers = layers.builder, parts(block.attentions)
    for i, resnet in enumerate(parts(block.resnets)):
        with b.scope(layers.path(resnet)):
            x = b.concat([x, skips.pop()], 1)
        x = layers.resnet(resnet, x, time)
        x = _transformer(layers, transformers[i], x, context) if transformers else x
    for upsampler in parts(block.upsamplers):
        # The next level's skip has the size before downsampling, which restores odd sizes exactly.
        height, width = skips[-1].shape[2:]
        x = layers.upsample(upsampler, x, (height, width))
    return x


def _transformer(layers: Layers, module: Transformer2DModel, x: Handle, context: Handle) -> Handle:
    """Apply a transformer to pixels (B, C, H, W) and the prompt; inside, pixels are tokens (B, C, 1, H W)."""
    b, (batch, channels, height, width) = layers.builder, x.shape
    with b.scope(layers.path(module)):
        h = layers.conv(module.proj_in, layers.group_norm(module.norm, x))
        h = b.reshape(h, (batch, channels, 1, height * width))
        for block in parts(module.transformer_blocks):
            h = _transformer_block(layers, block, h, context)
        h = layers.conv(module.proj_out, b.reshape(h, x.shape))
        return b.add(x, h)


def _transformer_block(layers: Layers, block: BasicTransformerBlock, x: Handle, context: Handle) -> Handle:
    b = layers.builder
    with b.scope(layers.path(block)):
        first = context if block.only_cross_attention else None
        x = b.add(x, layers.attention(block.attn1, layers.layer_norm(block.norm1, x), first))
        x = b.add(x, layers.attention(block.attn2, layers.layer_norm(block.norm2, x), context))
        gated, _, down = parts(block.ff.net)
        doubled = layers.conv(gated.proj, layers.layer_norm(block.norm3, x))
        with b.scope(layers.path(gated)):
            h, gate = b.split(doubled, 2, 1)
            h = b.mul(h, b.gelu(gate))
        return b.add(x, layers.conv(down, h))
