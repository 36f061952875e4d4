"""Seamless images: the networks commute with moving the image around in a circle, and so there is no seam."""

from __future__ import annotations

import pytest
import torch

import sfumato
from sfumato import GenerateRequest
from sfumato.kernels import CompilerError, kernels_for
from sfumato.models.packed import pack, unpack
from sfumato.models.seamless import seamless, wrapped
from support.checkpoints import SHAPES, UNET, VAE, randomize

AXES = [("x", (3,)), ("y", (2,)), ("xy", (2, 3))]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def moved(x: torch.Tensor, dims: tuple[int, ...], by: int) -> torch.Tensor:
    return torch.roll(x, [by] * len(dims), dims)


@pytest.mark.parametrize(("axes", "dims"), AXES)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_commutes_with_moving(axes, dims, stride):
    layer = randomize(torch.nn.Conv2d(3, 5, 3, padding=1, stride=stride)).double()
    x = randn(2, 3, 8, 12)
    with torch.no_grad(), seamless(layer, axes):
        assert layer(x).shape == (2, 5, 8 // stride, 12 // stride)
        # The order of a pixel's sum may depend on its place in a vector register.
        assert torch.allclose(layer(moved(x, dims, 2)), moved(layer(x), dims, 2 // stride), rtol=0, atol=1e-13)
    with torch.no_grad():
        inner = layer(x)[:, :, 1:-1, 1:-1]
        with seamless(layer, axes):
            assert torch.allclose(layer(x)[:, :, 1:-1, 1:-1], inner, rtol=0, atol=1e-13)
        assert not torch.allclose(layer(moved(x, dims, 2)), moved(layer(x), dims, 2 // stride), atol=1e-3)


@pytest.mark.parametrize(("axes", "dims"), AXES)
@pytest.mark.parametrize("config", [UNET, SHAPES["sd21"].unet, UNET | {"downsample_padding": 0}], ids=["1", "2", "pad"])
def test_the_unet_commutes_with_moving(config, axes, dims):
    unet = randomize(sfumato.UNet2DConditionModel(**config)).double().eval()
    x, states = randn(1, 4, 16, 24), randn(2, 5, unet.config.per_block("cross_attention_dim")[0])
    with torch.no_grad():
        before = unet(x, 300.0, states).sample
        with seamless(unet, axes):
            once, there = unet(x, 300.0, states).sample, unet(moved(x, dims, 8), 300.0, states).sample
        assert torch.allclose(there, moved(once, dims, 8), rtol=0, atol=1e-11 * once.abs().max().item())
        assert not torch.allclose(once, before, atol=1e-4)
        assert torch.equal(unet(x, 300.0, states).sample, before)  # and nothing of it stays


@pytest.mark.parametrize(("axes", "dims"), AXES)
def test_the_autoencoder_commutes_with_moving(axes, dims):
    vae = randomize(sfumato.AutoencoderKL(**VAE)).double().eval()
    factor = vae.config.scale_factor
    z = randn(1, 4, 8, 8)
    with torch.no_grad(), seamless(vae, axes):
        image, there = vae.decode(z).sample, vae.decode(moved(z, dims, 3)).sample
        assert torch.allclose(there, moved(image, dims, 3 * factor), rtol=0, atol=1e-11 * image.abs().max().item())
        mean = vae.encode(image).latent_dist.mean
        other = vae.encode(moved(image, dims, factor)).latent_dist.mean
        assert torch.allclose(other, moved(mean, dims, 1), rtol=0, atol=1e-11 * mean.abs().max().item())


@pytest.mark.parametrize("axes", ["x", "xy"])
@pytest.mark.parametrize("size", [(8, 16), (5, 9)], ids=["even", "odd"])
def test_packed_layers_draw_the_same(axes, size):
    try:
        kernels = kernels_for(torch.float32)
    except CompilerError:
        kernels = None
    unet = randomize(sfumato.UNet2DConditionModel(**UNET)).eval()
    x, states = randn(1, 4, *size).float(), randn(1, 5, 24).float()
    with torch.no_grad():
        with seamless(unet, axes):
            plain = unet(x, 300.0, states).sample
        pack(unet, kernels)
        with seamless(unet, axes):
            packed = unet(x, 300.0, states).sample
        unpack(unet)
    assert torch.allclose(packed, plain, rtol=0, atol=1e-4 * plain.abs().max().item())


def test_a_margin_may_be_larger_than_the_image():
    x = torch.arange(3.0)[None, None, None]
    assert wrapped(x, 4, 2, "x").flatten().tolist() == [2, 0, 1, 2, 0, 1, 2, 0, 1]
    assert wrapped(x, 4, 2, "y").shape == (1, 1, 7, 3)


@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiles"])
def test_a_picture_has_no_seam(ours, tiled):
    """Across the edge neighbours differ as they do within, and not as in a picture that ends there."""
    pipe = ours()
    pipe.vae.use_tiling = tiled
    request = GenerateRequest(prompt="a photo", steps=2, seed=2, width=128, height=64)
    try:
        images = [pipe.generate(request.replace(seamless=axes)) for axes in (None, "x")]
    finally:
        pipe.vae.use_tiling = False
    assert images[1].recipes[0]["request"]["seamless"] == "x"
    assert images[0].images[0].size == images[1].images[0].size == (128, 64)
    assert images[0].images[0].tobytes() != images[1].images[0].tobytes()
    if not tiled:
        latents = torch.randn((1, 4, 32, 32), generator=torch.Generator().manual_seed(0))
        from sfumato.pipelines.finite import FiniteWatch
        from sfumato.pipelines.stages import decode

        one = decode(pipe.vae, latents, FiniteWatch([]), "x")
        half = decode(pipe.vae, torch.roll(latents, 16, 3), FiniteWatch([]), "x")
        assert torch.allclose(torch.roll(one, one.shape[3] // 2, 3), half, atol=1e-5)
