"""Guidance by its formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato import UNet2DConditionModel
from sfumato.errors import UsageError
from sfumato.models.attention import Context
from sfumato.models.blocks import Moment
from sfumato.pipelines.conditioning import Conditioning
from sfumato.pipelines.guidance import Guidance, guide, rescale
from support.checkpoints import UNET, randomize


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
    """A U-Net that answers with the mean of what it was told, and notes each call."""

    config = type("Config", (), {"time_cond_proj_dim": None, "reads_guidance": False, "is_k": False})
    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, Context]] = []

    def moment(self, sample, timestep, class_labels=None, timestep_cond=None, added_cond_kwargs=None):
        return Moment(torch.full((1, 1), float(timestep)))

    def read(self, context):
        self.read_contexts = [*getattr(self, "read_contexts", []), context]

    def forward(self, x, time, context, return_dict=True):
        self.calls.append((x.shape[0], context))
        return (context.widen(torch.ones_like(x)) * context.states.mean(dim=(1, 2))[:, None, None, None],)


def test_negative_embeddings_double_the_batch_and_come_first():
    x, told = torch.zeros(2, 4, 3, 3), torch.ones(2, 5, 6)
    guidance = Guidance(unet=Echo(), conditioning=Conditioning((-told, told)), scale=3.0)
    assert torch.equal(guidance(x, 1.0), torch.full_like(x, -1 + 3.0 * 2))
    guidance.tell(embeds=torch.cat([told * 0, told]))
    assert torch.equal(guidance(x, 1.0), torch.full_like(x, 3.0))
    guidance.tell(embeds=told * 2)  # half as many: no more guidance
    assert torch.equal(guidance(x, 1.0), torch.full_like(x, 2.0))
    assert [(pictures, context.states.shape[0]) for pictures, context in guidance.unet.calls] == [
        (2, 4),
        (2, 4),
        (2, 2),
    ]


def test_a_scale_of_at_most_one_is_no_guidance_and_may_change_between_steps():
    x, told = torch.zeros(2, 4, 3, 3), torch.ones(2, 5, 6)
    guidance = Guidance(unet=Echo(), conditioning=Conditioning((-told, told)), scale=3.0)
    results = []
    for scale in (3.0, 1.0, 5.0):
        guidance.steer(scale, 0.0)
        results.append(guidance(x, 1.0).unique().tolist())
    assert results == [[5.0], [1.0], [9.0]]
    assert [context.states.shape[0] for _, context in guidance.unet.calls] == [4, 2, 4]
    plain = Guidance(unet=Echo(), conditioning=Conditioning((told,)), scale=1.0)
    with pytest.raises(UsageError, match="guidance_scale became 2 between steps"):
        plain.steer(2.0, 0.0)


def test_micro_batches_of_one_prompt_share_what_layers_make_of_it():
    told = torch.ones(5, 3, 6)
    guidance = Guidance(unet=Echo(), conditioning=Conditioning((-told, told)), scale=3.0, micro_batch=2)
    x = torch.zeros(5, 4, 3, 3)
    for _ in range(2):
        assert torch.equal(guidance(x, 1.0), torch.full_like(x, 5.0))
    assert [pictures for pictures, _ in guidance.unet.calls] == [2, 2, 1] * 2
    contexts = [context for _, context in guidance.unet.calls]
    assert contexts[0] is contexts[1] is contexts[3]
    assert guidance.unet.read_contexts == [contexts[0], contexts[2]]  # once a run, the short last one too


@settings(deadline=None, max_examples=15)
@given(pictures=st.integers(1, 5), micro_batch=st.integers(1, 6), guided=st.booleans(), same=st.booleans())
def test_micro_batches_change_no_picture(pictures, micro_batch, guided, same):
    unet = randomize(UNet2DConditionModel(**UNET)).double()
    x, embeds, negative = randn(0, pictures, 4, 8, 8), randn(1, pictures, 5, 24), randn(2, 1, 5, 24)
    embeds = embeds[:1].expand(pictures, -1, -1) if same else embeds
    told = Conditioning((negative.expand(pictures, -1, -1), embeds) if guided else (embeds,))
    with torch.no_grad():
        whole = Guidance(unet=unet, conditioning=told, scale=5.0)(x, 7.0)
        part = Guidance(unet=unet, conditioning=told, scale=5.0, micro_batch=micro_batch)
        for _ in range(2):
            assert torch.allclose(part(x, 7.0), whole, rtol=1e-9, atol=1e-9)


def test_shared_halves_equal_a_doubled_batch():
    unet = randomize(UNet2DConditionModel(**UNET))
    x, embeds = randn(0, 2, 4, 8, 8).float(), randn(1, 4, 5, 24).float()
    with torch.no_grad():
        doubled = unet(torch.cat([x, x]), 11, embeds).sample
        assert torch.allclose(unet(x, 11, embeds).sample, doubled, atol=1e-5)
        kept = Context(embeds)
        for timestep in (11, 500):
            moment = unet.moment(x, timestep)
            fresh = unet(torch.cat([x, x]), timestep, embeds).sample
            assert torch.allclose(unet(x, moment, kept).sample, fresh, atol=1e-5)


def test_compiled_it_is_one_graph_for_all_steps_and_prompts():
    from torch._dynamo.testing import CompileCounter

    unet, counter = randomize(UNet2DConditionModel(**UNET)), CompileCounter()
    x, embeds = randn(0, 1, 4, 8, 8).float(), randn(1, 2, 5, 24).float()
    plain = [
        Guidance(unet=unet, conditioning=Conditioning((e[1:], e[:1])), scale=5.0)(x, 7.0) for e in (embeds, 2 * embeds)
    ]
    unet.compile(backend=counter, dynamic=False, fullgraph=True)
    with torch.no_grad():
        for e, expected in zip((embeds, 2 * embeds), plain, strict=True):
            guidance = Guidance(unet=unet, conditioning=Conditioning((e[1:], e[:1])), scale=5.0)
            guidance(x, 900.0)
            assert torch.allclose(guidance(x, 7.0), expected, atol=1e-4)
    assert counter.frame_count == 1
