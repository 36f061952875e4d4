"""Guidance by its formulas."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from sfumato.pipelines.guidance import Guidance, guide, rescale


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape or (2, 4, 3, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(scale=st.floats(-10, 30))
def test_guidance_is_a_line_through_both_predictions(scale):
    unconditional, conditional = randn(0), randn(1)
    guided = guide(unconditional, conditional, scale)
    assert torch.allclose(guided, (1 - scale) * unconditional + scale * conditional)
    assert torch.allclose(guide(conditional, conditional, scale), conditional)


@given(factor=st.floats(0, 1))
def test_rescaling_brings_the_spread_back_picture_by_picture(factor):
    guided, conditional = randn(0) * 3 + 1, randn(1)
    result = rescale(guided, conditional, factor)
    for i in range(2):
        ratio = conditional[i].std() / guided[i].std()
        assert torch.allclose(result[i], guided[i] * (factor * ratio + 1 - factor))
    whole = rescale(guided, conditional, 1.0)
    assert torch.allclose(whole.std(dim=(1, 2, 3)), conditional.std(dim=(1, 2, 3)))


class Echo(torch.nn.Module):
    """A U-Net that answers with the mean of what it was told, and counts its calls."""

    config = type("Config", (), {"time_cond_proj_dim": None})
    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, x, t, embeds, timestep_cond=None, return_dict=True):
        self.batches.append(x.shape[0])
        return (torch.ones_like(x) * embeds.mean(dim=(1, 2))[:, None, None, None],)


def test_negative_embeddings_double_the_batch_and_come_first():
    x, told = torch.zeros(2, 4, 3, 3), torch.ones(2, 5, 6)
    guidance = Guidance(unet=Echo(), embeds=told, negative_embeds=-told, scale=3.0)
    assert torch.equal(guidance(x, 1.0), torch.full_like(x, -1 + 3.0 * 2))
    guidance.replace_embeds(torch.cat([told * 0, told]))
    assert torch.equal(guidance(x, 1.0), torch.full_like(x, 3.0))
    guidance.replace_embeds(told * 2)  # half as many: no more guidance
    assert torch.equal(guidance(x, 1.0), torch.full_like(x, 2.0))
    assert guidance.unet.batches == [4, 4, 2]
