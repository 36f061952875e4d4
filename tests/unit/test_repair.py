"""A stage that overflows in half precision is computed again in float32, said, and remembered."""

from __future__ import annotations

import json
import logging
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from sfumato import GenerateRequest
from sfumato.errors import CheckpointError, NonFiniteError
from sfumato.models.packed import is_packed, pack, packable
from sfumato.pipelines import stages
from sfumato.pipelines.finite import FiniteWatch
from sfumato.pipelines.repair import MEMORY, computed_in_float32, recall, remember, saved_randomness
from sfumato.pipelines.run import Run
from sfumato.pipelines.stages import Given
from support.checkpoints import SHAPES, randomize, write_ours
from support.compare import distance, generator

PROMPT = "a photo"
# Whose result, large where weights are, is brought back to size by the normalization after it.
OVERFLOWING = {
    "text encoder": ("text_encoder", "text_model.encoder.layers.2.mlp.fc2.weight"),
    "U-Net": ("unet", "mid_block.resnets.0.conv1.weight"),
    "VAE encoder": ("vae", "encoder.mid_block.resnets.0.conv1.weight"),
    "VAE decoder": ("vae", "decoder.mid_block.resnets.0.conv1.weight"),
}
# Between the stages, numbers are rounded to float16 in one of the two and not in the other.
FLOAT16 = 2e-2


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of its own for every test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SFUMATO_CACHE", str(folder))
    return folder


@pytest.fixture
def later(monkeypatch):
    """As on an accelerator: flags are read after the loop."""
    monkeypatch.setattr(FiniteWatch, "looks_at_once", staticmethod(lambda device: False))


@pytest.fixture
def overflowing(checkpoints):
    """`overflowing("U-Net")`: a float16 pipeline in which this stage, and only this one, leaves float16's range."""

    def get(*stages: str, cls=sfumato.StableDiffusionPipeline):
        pipe = cls.from_pretrained(checkpoints(), torch_dtype=torch.float16)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = sfumato.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
        for stage in stages:
            part, name = OVERFLOWING[stage]
            weight = getattr(pipe, part).get_parameter(name)
            weight.data = (weight.float() * (60000 / weight.float().abs().max())).half()
        return pipe

    return get


def draw(pipe, seed: int = 0, **call) -> torch.Tensor:
    """Pixels of two pictures, as a tensor."""
    generators = [generator(seed), generator(seed + 1)]
    call = {"num_inference_steps": 3, "num_images_per_prompt": 2, "output_type": "pt"} | call
    return pipe(PROMPT, generator=generators, return_dict=False, **call)[0]


def notes(pipe, **call) -> tuple[str, ...]:
    return pipe(PROMPT, generator=generator(), num_inference_steps=3, **call).notes


def same(model, before: dict[str, torch.Tensor]) -> bool:
    """Whether a model is as it was, wholly."""
    assert model.compute_dtype is None
    assert not any("forward" in layer.__dict__ for layer in model.modules())
    after = model.state_dict()
    return all(after[name].dtype == value.dtype and torch.equal(after[name], value) for name, value in before.items())


# ---- computing in float32 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", ["sd15", "sd21", "odd"])
def test_a_model_computes_in_float32_from_half_weights(shape, dtype):
    unet = randomize(sfumato.UNet2DConditionModel(**SHAPES[shape].unet)).to(dtype)
    wide = randomize(sfumato.UNet2DConditionModel(**SHAPES[shape].unet))
    wide.load_state_dict(unet.state_dict())
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    x, embeds = torch.randn(2, 4, 6, 10, generator=generator()), torch.randn(2, 5, 24, generator=generator(1))
    with torch.no_grad(), computed_in_float32(unet):
        assert unet.dtype == torch.float32
        repaired = unet(x, 7.0, embeds).sample
    assert unet.dtype == dtype
    assert same(unet, before)
    with torch.no_grad():
        assert torch.equal(repaired, wide(x, 7.0, embeds).sample)
        assert distance(unet(x.to(dtype), 7.0, embeds.to(dtype)).sample, repaired) > 1e-5


def test_every_component_computes_in_float32(overflowing):
    pipe = overflowing()
    wide = overflowing().to(torch.float32)
    ids, z = torch.arange(20)[None], torch.randn(1, 4, 8, 8, generator=generator())
    pixels = torch.rand(1, 3, 16, 16, generator=generator())
    calls = [
        (pipe.text_encoder, wide.text_encoder, lambda model: model(ids).last_hidden_state),
        (pipe.vae, wide.vae, lambda model: model.decode(z).sample),
        (pipe.vae, wide.vae, lambda model: model.encode(pixels).latent_dist.parameters),
    ]
    for half, full, call in calls:
        with torch.no_grad(), computed_in_float32(half):
            repaired = call(half)
        with torch.no_grad():
            assert torch.equal(repaired, call(full))


@pytest.mark.skipif(not packable(torch.bfloat16), reason="this build of torch has no oneDNN to pack weights for")
def test_a_packed_model_is_unpacked_and_computes_in_float32():
    unet = randomize(sfumato.UNet2DConditionModel(**SHAPES["sd15"].unet)).to(torch.bfloat16)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    inputs = torch.randn(1, 4, 8, 8, generator=generator()), 7.0, torch.randn(1, 5, 24, generator=generator(1))
    with torch.no_grad(), computed_in_float32(unet):
        expected = unet(*inputs).sample
    pack(unet, None)
    assert is_packed(unet)
    with torch.no_grad(), computed_in_float32(unet):
        assert torch.equal(unet(*inputs).sample, expected)
    assert not is_packed(unet)
    assert same(unet, before)


def test_a_compiled_model_computes_in_float32_without_what_was_compiled():
    unet = randomize(sfumato.UNet2DConditionModel(**SHAPES["sd15"].unet)).half()
    x, embeds = torch.randn(1, 4, 8, 8, generator=generator()), torch.randn(1, 5, 24, generator=generator(1))
    calls: list[int] = []

    def backend(graph, example_inputs):
        def run(*arguments):
            calls.append(1)
            return graph(*arguments)

        return run

    unet.compile(backend=backend)
    with torch.no_grad(), computed_in_float32(unet):
        repaired = unet(x, 7.0, embeds).sample
    assert (repaired.dtype, calls) == (torch.float32, [])
    with torch.no_grad():
        assert unet(x.half(), 7.0, embeds.half()).sample.dtype == torch.float16
    assert calls
    torch.compiler.reset()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_model_is_left_as_it_was_when_a_layer_raises(error):
    unet = randomize(sfumato.UNet2DConditionModel(**SHAPES["sd15"].unet)).half()
    before = {name: value.clone() for name, value in unet.state_dict().items()}

    def stop(*_: object) -> None:
        raise error("in the middle")

    handle = unet.mid_block.resnets[0].norm2.register_forward_pre_hook(stop)
    with pytest.raises(error, match="in the middle"), computed_in_float32(unet):
        unet(torch.zeros(1, 4, 8, 8), 1.0, torch.zeros(1, 3, 24))
    handle.remove()
    assert same(unet, before)


# ---- repair, stage by stage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "named"),
    [("text encoder", "text encoder"), ("U-Net", "U-Net, step 1 of 3"), ("VAE decoder", "VAE decoder")],
)
def test_a_stage_is_repaired_named_and_remembered(overflowing, cache, caplog, stage, named):
    pipe = overflowing(stage)
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in (pipe.unet, pipe.vae)]
    with caplog.at_level(logging.WARNING, logger="sfumato"):
        said = notes(pipe)
    assert said == (f"{named}: float16 gave NaN or infinity, so it was computed again in float32",)
    assert [record.getMessage() for record in caplog.records] == list(said)
    assert [*json.loads((cache / MEMORY).read_text())] == [f"{stage} on cpu in float16"]
    assert same(pipe.unet, before[0])
    assert same(pipe.vae, before[1])

    again = overflowing(stage)
    repaired = draw(again)
    assert notes(again) == (f"{stage}: computed in float32, because float16 failed with this checkpoint before",)
    assert distance(repaired, draw(overflowing(stage).to(torch.float32))) < FLOAT16


def test_the_encoder_is_repaired_with_the_noise_it_had(overflowing):
    pipes = [overflowing("VAE encoder", cls=sfumato.StableDiffusionImg2ImgPipeline) for _ in range(3)]
    image = Image.effect_noise((16, 16), 90).convert("RGB")

    def redraw(pipe):
        return draw(pipe, image=image, strength=0.7)

    first, remembered = redraw(pipes[0]), redraw(pipes[1])
    assert notes(pipes[1], image=image)[0].startswith("VAE encoder: computed in float32, because")
    assert torch.equal(first, remembered)
    assert distance(first, redraw(pipes[2].to(torch.float32))) < FLOAT16


@pytest.mark.parametrize("stage", ["text encoder", "U-Net", "VAE decoder"])
def test_a_repaired_picture_is_the_remembered_one(overflowing, cache, stage):
    assert torch.equal(draw(overflowing(stage)), draw(overflowing(stage)))
    assert len(json.loads((cache / MEMORY).read_text())) == 1


def test_a_later_step_is_repeated_where_it_stands(overflowing, cache):
    pipe = overflowing()
    calls = []

    def spoil(unet, _, output):
        calls.append(unet.dtype)
        return (output[0] * float("nan"),) if len(calls) == 2 else output

    handle = pipe.unet.register_forward_hook(spoil)
    request = GenerateRequest(prompt=PROMPT, steps=4, seed=0)
    numbers = []
    result = pipe.generate(request, lambda step: numbers.append(step.number))
    handle.remove()
    assert numbers == [1, 2, 3, 4]
    assert calls == [torch.float16, torch.float16, *[torch.float32] * 3]
    assert result.notes == ("U-Net, step 2 of 4: float16 gave NaN or infinity, so it was computed again in float32",)
    (cache / MEMORY).unlink()
    whole = pipe.generate(request)
    assert whole.notes == ()
    difference = np.asarray(whole.images[0], dtype=int) - np.asarray(result.images[0], dtype=int)
    assert 0 < np.abs(difference).max() < 255 * FLOAT16


def test_nothing_is_repaired_or_kept_without_need(overflowing, cache):
    pipe = overflowing()
    assert notes(pipe) == ()
    assert not (cache / MEMORY).exists()


# ---- accelerators ---------------------------------------------------------------------------------------------------


def test_on_an_accelerator_all_steps_are_repeated_with_the_same_noise(overflowing, later):
    pipe = overflowing("U-Net")
    numbers = []
    result = pipe.generate(GenerateRequest(prompt=PROMPT, steps=3, seed=5), lambda step: numbers.append(step.number))
    assert numbers == [1, 2, 3, 1, 2, 3]
    assert result.notes == ("U-Net, step 1 of 3: float16 gave NaN or infinity, so it was computed again in float32",)
    remembered = overflowing("U-Net").generate(result.request)
    assert remembered.notes == ("U-Net: computed in float32, because float16 failed with this checkpoint before",)
    assert np.array_equal(np.asarray(result.images[0]), np.asarray(remembered.images[0]))


def test_an_accelerator_is_not_made_to_wait_between_steps(overflowing, monkeypatch):
    looks = []
    settle = FiniteWatch.settle
    monkeypatch.setattr(FiniteWatch, "looks_at_once", staticmethod(lambda device: False))
    monkeypatch.setattr(FiniteWatch, "settle", lambda watch: looks.append("loop ends") or settle(watch))
    overflowing().generate(GenerateRequest(prompt=PROMPT, steps=2), lambda step: looks.append(step.number))
    assert looks == [1, 2, "loop ends"]


def test_torch_s_own_randomness_is_the_same_in_the_repeat(overflowing, later):
    pipes = overflowing("U-Net"), overflowing("U-Net")
    latents = []
    for pipe in pipes:
        torch.manual_seed(3)
        latents.append(pipe(PROMPT, num_inference_steps=3, output_type="latent").images)
    assert torch.equal(*latents)


def test_a_repeat_begins_with_the_prompt_it_had(overflowing, later):
    def forget_the_negative(pipe, index, timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[1]} if index == 0 else {}

    call = {"callback_on_step_end": forget_the_negative, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    first = draw(overflowing("U-Net"), **call)
    assert torch.equal(first, draw(overflowing("U-Net"), **call))


def test_a_repeat_is_steered_and_interrupted_as_the_first_pass(overflowing, later):
    seen = []

    def steer(pipe, index, timestep, tensors):
        seen.append((index, pipe.guidance_scale))
        pipe._guidance_scale = 2.0
        pipe._interrupt = len(seen) == 2  # as a button would, pressed once

    draw(overflowing("U-Net"), num_inference_steps=4, callback_on_step_end=steer)
    assert seen == [(0, 7.5), (1, 2.0)] * 2


def test_a_preview_of_a_step_gone_wrong_is_grey_and_blames_nobody(overflowing, later):
    pipe = overflowing("U-Net")
    previews = []
    result = pipe.generate(
        GenerateRequest(prompt=PROMPT, steps=2, seed=0), lambda step: previews.append(step.preview()[0])
    )
    assert len(previews) == 4
    assert [note.partition(":")[0] for note in result.notes] == ["U-Net, step 1 of 2"]
    assert np.array_equal(np.asarray(previews[0]), np.asarray(previews[1]))
    assert not np.array_equal(np.asarray(previews[0]), np.asarray(previews[2]))


def test_saved_randomness_goes_back():
    one, other = generator(1), generator(2)
    for generators in (one, [one, other], None):
        go_back = saved_randomness(generators, torch.device("cpu"))
        drawn = [torch.rand(3, generator=each) for each in (one, other, None)]
        go_back()
        again = [torch.rand(3, generator=each) for each in (one, other, None)]
        saved = {id(one): [True, False, False], id(None): [False, False, True]}.get(id(generators), [True, True, False])
        assert [torch.equal(a, b) for a, b in zip(drawn, again, strict=True)] == saved


# ---- what float32 does not help -------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [True, False])
def test_what_is_not_finite_in_float32_either_is_an_error_and_not_remembered(overflowing, cache, monkeypatch, at_once):
    monkeypatch.setattr(FiniteWatch, "looks_at_once", staticmethod(lambda device: at_once))
    latents = torch.zeros(1, 4, 8, 8)
    latents[0, 0, 0, 0] = float("inf")
    pipe = overflowing()
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"^U-Net, step 1 of 2: .*; check the prompt embeddings, latents or"):
        pipe(PROMPT, latents=latents, num_inference_steps=2)
    assert same(pipe.unet, before)
    assert not (cache / MEMORY).exists()


def test_a_damaged_weight_is_named_without_a_repeat(overflowing, later):
    pipe = overflowing()
    pipe.unet.conv_in.bias.data.fill_(float("nan"))
    numbers = []
    with pytest.raises(CheckpointError, match=r"^U-Net, step 1 of 3: the weight 'conv_in.bias' has NaN"):
        pipe.generate(GenerateRequest(prompt=PROMPT, steps=3), lambda step: numbers.append(step.number))
    assert numbers == [1, 2, 3]


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_the_memory_knows_checkpoint_component_and_precision(tmp_path):
    write_ours(tmp_path / "a", seed=0)
    write_ours(tmp_path / "b", seed=7)
    first, other = (
        sfumato.UNet2DConditionModel.from_pretrained(tmp_path / name, subfolder="unet", torch_dtype=torch.float16)
        for name in "ab"
    )
    assert not recall("U-Net", first)
    remember("U-Net", first)
    assert recall("U-Net", first)
    assert not recall("U-Net", other)
    assert not recall("VAE decoder", first)
    assert not recall("U-Net", first.to(torch.bfloat16))
    remember("U-Net", other)
    assert recall("U-Net", other)
    assert recall("U-Net", first.to(torch.float16))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 3}', '{"a": [3]}', '{"U-Net on cpu in float16": "x"}', "\x00"])
def test_a_damaged_memory_starts_anew(overflowing, cache, caplog, text):
    cache.mkdir()
    (cache / MEMORY).write_text(text)
    with caplog.at_level(logging.WARNING, logger="sfumato"):
        notes(overflowing("U-Net"))
    said = [record.getMessage() for record in caplog.records if "was damaged" in record.getMessage()]
    assert said == [f"{cache / MEMORY} was damaged and is recreated"]
    assert notes(overflowing("U-Net"))[0].startswith("U-Net: computed in float32")


def test_a_memory_that_cannot_be_written_stops_nothing(overflowing, cache, caplog):
    cache.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, logger="sfumato"):
        said = notes(overflowing("VAE decoder"))
    assert len(said) == 1
    (about,) = [message for message in caplog.messages if "cache" in message]
    assert about.startswith(f"the cache in {cache} cannot be used (it is not a folder); ")
    assert cache.read_text() == "a file where the folder should be"


# ---- decoding in slices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [None, 1, 2, 5, 64])
def test_slices_decode_the_same_pictures(ours, monkeypatch, micro_batch):
    pipe = ours()
    run = Run(pipe.parts, pipe.place, GenerateRequest(prompt=PROMPT), Given(), pipe.scheduler, micro_batch=micro_batch)
    latents = torch.randn(5, 4, 8, 8, generator=generator())
    whole = Run(pipe.parts, pipe.place, run.request, Given(), pipe.scheduler).pixels(latents)
    held: list[weakref.ref[torch.Tensor]] = []
    sizes: list[int] = []
    decode = stages.decode

    def watched(vae, part, watch, *rest, **more):
        pixels = decode(vae, part, watch, *rest, **more)
        held.append(weakref.ref(pixels))
        sizes.append(part.shape[0])
        assert sum(one() is not None for one in held) <= 2  # the slice that is being turned into pictures, and this one
        return pixels

    monkeypatch.setattr(stages, "decode", watched)
    pictures = run.pictures(latents)
    assert sum(sizes) == 5
    assert max(sizes) == min(5, micro_batch or 5)
    expected = (whole.permute(0, 2, 3, 1).numpy() * 255).round()
    assert np.abs(np.stack([np.asarray(one) for one in pictures]) - expected).max() <= 1
    monkeypatch.undo()
    torch.testing.assert_close(run.pixels(latents), whole, rtol=0, atol=1e-6)
    assert run.seconds["decode"] > 0


def test_a_bad_slice_is_repaired_and_later_ones_are_float32_at_once(overflowing):
    pipe = overflowing("VAE decoder")
    run = Run(pipe.parts, pipe.place, GenerateRequest(prompt=PROMPT), Given(), pipe.scheduler, micro_batch=1)
    precisions = []
    handle = pipe.vae.decoder.register_forward_pre_hook(lambda _, args: precisions.append(pipe.vae.dtype))
    assert len(run.pictures(torch.randn(3, 4, 8, 8, generator=generator()))) == 3
    handle.remove()
    assert precisions == [torch.float16, *[torch.float32] * 3]
    assert len(run.notes) == 1
