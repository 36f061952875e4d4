"""What the U-Net is told, and the parts of a checkpoint, as values."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sfumato
from sfumato.errors import UsageError
from sfumato.pipelines.conditioning import Conditioning
from sfumato.pipelines.public.call import FRAMING, GIVEN, REQUEST
from sfumato.pipelines.public.steered import CONTROL
from sfumato.pipelines.stages import Given
from sfumato.request import Framing


@given(branches=st.integers(1, 3), pictures=st.integers(1, 7), size=st.integers(1, 8))
def test_what_is_split_and_put_together_is_the_same(branches, pictures, size):
    embeds = torch.arange(branches * pictures * 6.0).view(branches * pictures, 2, 3)
    pooled, sizes = embeds[:, 0], embeds[:, 1]
    told = Conditioning(embeds.split(pictures), pooled.split(pictures), sizes.split(pictures))
    assert (told.branches, told.pictures) == (branches, pictures)
    assert torch.equal(told.joined("embeds"), embeds)
    assert torch.equal(told.with_time["text_embeds"], pooled)
    assert torch.equal(told.with_time["time_ids"], sizes)
    parts = told.split(size)
    assert [part.pictures for part in parts] == [len(rows) for rows in torch.arange(pictures).split(size)]
    for name in ("embeds", "pooled", "sizes"):
        for branch in range(branches):
            whole = torch.cat([getattr(part, name)[branch] for part in parts])
            assert torch.equal(whole, getattr(told, name)[branch])
    assert torch.equal(told.told(embeds=2 * embeds).joined("embeds"), 2 * embeds)
    alone = told.told(embeds=embeds[-pictures:])
    assert torch.equal(alone.joined("pooled"), told.unguided.joined("pooled"))
    assert alone.branches == 1
    assert Conditioning(told.embeds).with_time == {}
    if branches == 1:
        with pytest.raises(UsageError, match="without negative pooled prompts"):
            told.told(embeds=torch.cat([embeds, embeds]))


def test_parts_are_a_value(ours):
    pipe = ours()
    before, scheduler = pipe.parts, sfumato.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler = scheduler
    assert pipe.scheduler is pipe.parts.scheduler is scheduler is not before.scheduler
    after = {name: part for name, part in pipe.components.items() if name not in pipe.index.absent}
    assert before.components.keys() == after.keys()
    assert [name for name in after if after[name] is not before.components[name]] == ["scheduler"]
    with pytest.raises(UsageError, match="unet must be a UNet2DConditionModel"):
        dataclasses.replace(before, unet=pipe.vae)


@pytest.mark.parametrize("cls", sfumato.DiffusionPipeline.__subclasses__())
def test_every_argument_of_a_call_goes_somewhere(cls):
    arguments = inspect.signature(cls.__call__).parameters.keys() - {"self", "unknown"}
    how = {"output_type", "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs"}
    how.add("cross_attention_kwargs")  # its "scale" is the request's adapter_scale
    if {"controlnet", "adapter"} & {*cls.index.parts}:  # these become what `steered` holds
        arguments -= {*CONTROL, "control_image"}
    how |= {"callback", "callback_steps"}  # in older signatures, in place of those on a step's end
    left = arguments - REQUEST.keys() - FRAMING.keys() - GIVEN.keys()
    assert left <= how
    assert left & {"callback", "callback_on_step_end"}
    assert set(REQUEST.values()) <= {field.name for field in dataclasses.fields(sfumato.GenerateRequest)}
    nested = sfumato.GenerateRequest.nested
    assert {field for field, _ in FRAMING.values()} == {name for name, kind in nested.items() if kind is Framing}
    assert {*GIVEN.values(), "pixels"} == {
        field.name for field in dataclasses.fields(Given)
    }  # pixels are made from the image
