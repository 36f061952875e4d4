"""The pipelines' own promises: seeds, checks, messages, previews, and parts that can be exchanged."""

from __future__ import annotations

import logging
import shutil

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import sfumato
from sfumato import GenerateRequest
from sfumato.errors import (
    CheckpointError,
    ConfigError,
    NonFiniteError,
    OutputError,
    SfumatoError,
    UnknownArgument,
    UsageError,
)

PROMPT = "a photo"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def fresh(checkpoints):
    """A pipeline whose weights may be edited, and how to load it in another precision."""

    def get(**options):
        pipe = sfumato.StableDiffusionPipeline.from_pretrained(checkpoints(), **options)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return get


# ---- seeds ----------------------------------------------------------------------------------------------------------


def start(pipe, **call) -> torch.Tensor:
    """The latents before the first step, caught where the U-Net is first called."""
    caught: list[torch.Tensor] = []
    unet = pipe.unet
    handle = unet.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    try:
        pipe(num_inference_steps=1, output_type="latent", guidance_scale=1.0, **call)
    finally:
        handle.remove()
    return caught[0]


def test_precision_does_not_change_the_noise(fresh):
    single = start(fresh(), prompt=PROMPT, generator=generator(3))
    for dtype in (torch.bfloat16, torch.float16):
        half = start(fresh(torch_dtype=dtype), prompt=PROMPT, generator=generator(3))
        assert half.dtype == dtype
        assert torch.equal(half, single.to(dtype))


def test_a_batch_is_its_pictures(ours):
    """With a generator for each, as many at a time as one likes (SPEC A8)."""
    pipe = ours()
    call = {"num_inference_steps": 3, "output_type": "latent"}
    for name in ("EulerAncestralDiscreteScheduler", "DPMSolverSDEScheduler", "PNDMScheduler"):
        pipe.scheduler = getattr(sfumato, name).from_config(pipe.scheduler.config)
        whole = pipe([PROMPT] * 3, generator=[generator(i) for i in range(3)], **call).images
        pair = pipe([PROMPT] * 2, generator=[generator(0), generator(1)], **call).images
        alone = [pipe(PROMPT, generator=generator(i), **call).images for i in range(3)]
        assert torch.allclose(whole, torch.cat(alone), rtol=1e-4, atol=1e-4 * whole.abs().max().item())
        assert torch.allclose(whole[:2], pair, rtol=1e-4, atol=1e-4 * whole.abs().max().item())


def test_image_i_has_seed_plus_i(ours):
    pipe = ours()
    result = pipe.generate(GenerateRequest(prompt=PROMPT, steps=2, seed=41, count=3))
    assert result.seeds == (41, 42, 43)
    second = pipe.generate(GenerateRequest(prompt=PROMPT, steps=2, seed=42))
    assert np.abs(np.asarray(second.images[0], int) - np.asarray(result.images[1], int)).max() <= 1
    assert [recipe["request"]["seed"] for recipe in result.recipes] == [41, 42, 43]


def test_seed_0_is_a_seed(ours):
    pipe = ours()
    results = [pipe.generate(GenerateRequest(prompt=PROMPT, steps=1, seed=0)) for _ in range(2)]
    assert results[0].seeds == (0,)
    assert results[0].images[0].tobytes() == results[1].images[0].tobytes()


def test_without_a_seed_one_is_picked_and_told(ours):
    pipe = ours()
    first = pipe.generate(GenerateRequest(prompt=PROMPT, steps=1))
    again = pipe.generate(first.request)
    assert first.request.seed == first.seeds[0]
    assert first.images[0].tobytes() == again.images[0].tobytes()
    assert pipe.generate(GenerateRequest(prompt=PROMPT, steps=1)).seeds != first.seeds


def test_torchs_own_random_numbers_are_left_alone(ours):
    """No seeding behind a user's back."""
    before = torch.random.get_rng_state()
    ours().generate(GenerateRequest(prompt=PROMPT, steps=2, seed=3))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_first_and_later_calls_are_equal(ours):
    pipe = ours()
    images = [pipe(PROMPT, num_inference_steps=3, generator=generator(), output_type="pt").images for _ in range(3)]
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**63 - 1), steps=st.integers(1, 3), scheduler=st.sampled_from([None, "euler_a", "dpmpp_2m", "ddim"]))  # fmt: skip
def test_a_recipe_draws_its_picture_again(ours, seed, steps, scheduler):
    pipe = ours()
    result = pipe.generate(GenerateRequest(prompt=PROMPT, steps=steps, seed=seed, scheduler=scheduler))
    again = pipe.generate(GenerateRequest.from_dict(result.recipes[0]["request"]))
    assert again.images[0].tobytes() == result.images[0].tobytes()
    assert again.recipes[0] == result.recipes[0]


# ---- lost words -----------------------------------------------------------------------------------------------------


def test_the_result_says_which_words_were_lost(ours, caplog):
    pipe = ours()
    long = "the cat of the red heart " * 5 + "and a final word"
    with caplog.at_level(logging.WARNING, logger="sfumato"):
        result = pipe.generate(GenerateRequest(prompt=long, negative_prompt="x y z " * 30, steps=1, seed=0))
    assert len(result.notes) == 2
    assert result.notes[0].endswith("and a final word'")
    assert "20 tokens" in result.notes[0]
    assert [record.getMessage() for record in caplog.records] == list(result.notes)
    assert pipe(long, num_inference_steps=1).notes == result.notes[:1]
    assert pipe.generate(GenerateRequest(prompt=PROMPT, steps=1)).notes == ()


# ---- finite ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "weight", "stage"),
    [
        ("text_encoder", "text_model.encoder.layers.1.mlp.fc1.weight", "text encoder"),
        ("unet", "mid_block.resnets.0.conv1.bias", "U-Net, step 1 of 3"),
        ("vae", "decoder.conv_out.bias", "VAE decoder"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_weight_is_named_with_its_stage(fresh, part, weight, stage, value):
    pipe = fresh()
    pipe.scheduler = sfumato.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    model = getattr(pipe, part)
    model.load_state_dict(model.state_dict() | {weight: torch.full_like(model.state_dict()[weight], value)})
    with pytest.raises(CheckpointError) as caught:
        pipe(PROMPT, num_inference_steps=3)
    assert str(caught.value).startswith(f"{stage}: the weight {weight!r} has NaN or infinite values")


def test_a_damaged_encoder_is_named(fresh):
    pipe = sfumato.StableDiffusionImg2ImgPipeline.from_pipe(fresh())
    state = pipe.vae.state_dict()
    pipe.vae.load_state_dict(state | {"encoder.conv_in.bias": state["encoder.conv_in.bias"] * float("nan")})
    with pytest.raises(CheckpointError, match=r"^VAE encoder: the weight 'encoder\.conv_in\.bias'"):
        pipe(PROMPT, image=Image.new("RGB", (16, 16)))


def test_damaged_inputs_name_their_stage(ours):
    nan = torch.full((1, 20, 24), float("nan"))
    with pytest.raises(NonFiniteError) as caught:
        ours()(prompt_embeds=nan, num_inference_steps=1)
    assert caught.value.stage == "prompt embeddings"
    latents = torch.zeros(1, 4, 8, 8)
    latents[0, 0, 0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"^U-Net, step 1 of") as caught:
        ours()(PROMPT, latents=latents, num_inference_steps=2)
    assert "\n" not in str(caught.value)


# ---- bad input ------------------------------------------------------------------------------------------------------

BAD_CALLS = [
    ({}, "the prompt is missing"),
    ({"prompt": 7}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": PROMPT, "num_inference_steps": 0}, "steps must be"),
    ({"prompt": PROMPT, "num_inference_steps": -4}, "steps must be"),
    ({"prompt": PROMPT, "height": 17}, "height must be divisible by 2"),
    ({"prompt": PROMPT, "width": 16, "height": 15}, "try 14 or 16"),
    ({"prompt": PROMPT, "width": 0}, "width"),
    ({"prompt": PROMPT, "num_images_per_prompt": 0}, "count"),
    ({"prompt": ["a", "b"], "generator": [generator()]}, "1 generators for 2 images"),
    ({"prompt": PROMPT, "generator": [generator(), generator()]}, "2 generators for 1 images"),
    ({"prompt": ["a", "b"], "negative_prompt": ["x"]}, "got 1 for 2 prompts"),
    ({"prompt": PROMPT, "negative_prompt": 5}, "negative_prompt"),
    ({"prompt": PROMPT, "prompt_embeds": torch.zeros(1, 20, 24)}, "prompt and prompt_embeds"),
    ({"prompt": PROMPT, "negative_prompt": "x", "negative_prompt_embeds": torch.zeros(1, 20, 24)}, "cannot be combined"),
    ({"prompt_embeds": torch.zeros(1, 20, 24), "negative_prompt_embeds": torch.zeros(1, 19, 24)}, "must have the same shape"),
    ({"prompt_embeds": torch.zeros(1, 20, 23)}, "prompt_embeds"),
    ({"prompt_embeds": torch.zeros(20, 24)}, "prompt_embeds"),
    ({"prompt_embeds": torch.zeros(2, 20, 24), "negative_prompt": ["x", "y", "z"]}, "negative"),
    ({"prompt": "\ud800"}, "not valid UTF-8"),
    ({"prompt": PROMPT, "generator": 5}, "generator must be a torch.Generator"),
    ({"prompt": PROMPT, "generator": [5]}, "generator must be a torch.Generator"),
    ({"prompt": PROMPT, "latents": [1]}, "latents must be a tensor"),
    ({"prompt": PROMPT, "latents": torch.zeros(1, 4, 8, 8).long()}, "latents must be a tensor of floating-point"),
    ({"prompt": PROMPT, "latents": torch.zeros(0, 4, 8, 8)}, "latents must have the shape"),
    ({"prompt_embeds": "x"}, "prompt_embeds must be a tensor"),
    ({"prompt_embeds": torch.zeros(1, 20, 23), "guidance_scale": 1.0}, "embeddings have 23 values per token, but this U-Net needs 24"),
    ({"prompt": PROMPT, "timesteps": ["x"]}, "timesteps must be"),
    ({"prompt": PROMPT, "num_inference_steps": 10**9}, "steps must be at most"),
    ({"prompt": PROMPT, "num_images_per_prompt": 10**9}, "count must be at most"),
    ({"prompt": PROMPT, "output_type": 5}, "output_type"),
    ({"prompt": PROMPT, "latents": torch.zeros(1, 3, 8, 8)}, "latents must have the shape"),
    ({"prompt": PROMPT, "latents": torch.zeros(2, 4, 8, 8)}, "latents must have the shape"),
    ({"prompt": PROMPT, "width": 16, "height": 16, "latents": torch.zeros(1, 4, 8, 9)}, "latents must have the shape"),
    ({"prompt": PROMPT, "latents": torch.zeros(4, 8, 8)}, "latents must have the shape"),
    ({"prompt": PROMPT, "output_type": "pill"}, "did you mean 'pil'"),
    ({"prompt": PROMPT, "clip_skip": 3}, "clip_skip must be from 0 to 2"),
    ({"prompt": PROMPT, "timesteps": [1], "sigmas": [1.0]}, "timesteps and sigmas"),
    ({"prompt": PROMPT, "timesteps": [900, 100]}, "timesteps"),
    ({"prompt": PROMPT, "sigmas": [3.0, 0.0]}, "sigmas"),
    ({"prompt": PROMPT, "guidance_scale": float("nan")}, "guidance_scale"),
    ({"prompt": PROMPT, "guidance_scale": 10**30}, "guidance_scale must be a number from -1000 to 1000"),
    ({"prompt": PROMPT, "callback_on_step_end": dict}, "callback_on_step_end must be a function"),
    ({"prompt": PROMPT, "callback": dict}, "callback must be a function (step, timestep, latents)"),
    ({"prompt": PROMPT, "callback": print, "callback_steps": 0}, "callback_steps must be a whole number"),
    ({"prompt": PROMPT, "callback": print, "callback_on_step_end": print}, "cannot be combined"),
    ({"prompt": PROMPT, "callback_on_step_end": lambda *_: 5}, "must return a dict of tensors, or None, not 5"),
    ({"prompt": PROMPT, "callback_on_step_end": lambda *_: {"latents": [1]}}, "returned [1] as latents"),
    ({"prompt": PROMPT, "callback_on_step_end": lambda *_: {"prompt_embeds": 1}}, "returned 1 as prompt_embeds"),
    ({"prompt": PROMPT, "callback_on_step_end": lambda *_: {"latents": torch.zeros(3)}}, "with the shape (3,); keep (1, 4, 8, 8)"),
    ({"prompt": PROMPT, "num_inference_step": 3}, "did you mean 'num_inference_steps'"),
    ({"prompt": PROMPT, "ip_adapter_image": 3}, "ip_adapter_image needs an IP-Adapter; load one with load_ip_adapter"),
    ({"prompt": PROMPT, "callback_on_step_end": lambda *_: {}, "callback_on_step_end_tensor_inputs": ["noise"]}, "'noise'"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "says"), BAD_CALLS)
def test_a_wrong_call_is_one_sentence(ours, call, says):
    with pytest.raises(UsageError) as caught:
        ours()(**call)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["vae", "unet", "scheduler"])
def test_a_pipeline_without_a_part_draws_nothing_until_it_is_there(checkpoints, part):
    whole = sfumato.StableDiffusionPipeline.from_pretrained(checkpoints())
    pipe = sfumato.StableDiffusionPipeline.from_pretrained(checkpoints(), **{part: None})
    assert getattr(pipe, part) is None
    assert pipe.components[part] is None
    for draw in (
        lambda: pipe(PROMPT, num_inference_steps=1),
        lambda: pipe.generate(GenerateRequest(prompt=PROMPT, steps=1)),
    ):
        with pytest.raises(UsageError, match=rf"{part} was left out \(None\), so only encode_prompt works"):
            draw()
    setattr(pipe, part, getattr(whole, part))
    drawn = [one(PROMPT, num_inference_steps=1, generator=generator()).images[0].tobytes() for one in (pipe, whole)]
    assert drawn[0] == drawn[1]
    with pytest.raises(UsageError, match=f"{part} is None; pass it too, or a text encoder"):
        sfumato.StableDiffusionPipeline.from_pretrained(checkpoints(), text_encoder=None, **{part: None})


@pytest.mark.parametrize("shape", ["sd15", "sdxl", "refiner"])
def test_text_encoders_alone_encode_prompts(checkpoints, ours, shape, tmp_path):
    """With weights of no other part, from a folder and from parts, in the precision that they are in."""
    whole = ours(shape)
    left_out = dict.fromkeys(("unet", "vae", "scheduler"))
    texts = {name: one for name, one in whole.components.items() if "text" in name or "tokenizer" in name}
    folder = tmp_path / "texts"
    shutil.copytree(checkpoints(shape), folder, ignore=lambda _, names: {"unet", "vae", "scheduler"} & {*names})
    pipes = [type(whole)(**texts, **left_out), type(whole).from_pretrained(folder, **left_out)]
    expected = whole.encode_prompt("a cat", negative_prompt="dog")
    for pipe in pipes:
        assert (pipe.unet, pipe.vae, pipe.scheduler) == (None, None, None)
        assert (str(pipe.device), pipe.dtype) == ("cpu", torch.float32)
        for one, other in zip(pipe.encode_prompt("a cat", negative_prompt="dog"), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    half = pipes[1].to(torch.bfloat16).encode_prompt("a cat")[0]
    assert half.dtype == pipes[1].dtype == torch.bfloat16
    read = dict(zip(("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"), expected, strict=False))  # fmt: skip
    if shape == "sd15":
        rest = {name: one for name, one in whole.components.items() if name not in texts}
        drawn = type(whole)(**rest, **dict.fromkeys(texts))(**read, num_inference_steps=2, generator=generator(), output_type="np")  # fmt: skip
        same = whole("a cat", negative_prompt="dog", num_inference_steps=2, generator=generator(), output_type="np")
        np.testing.assert_allclose(drawn.images, same.images, atol=1e-4)


def test_a_missing_variant_is_both_of_the_errors_that_code_catches(checkpoints):
    for error in (ValueError, OSError):
        with pytest.raises(error, match="has no variant 'fp16'; omit variant"):
            sfumato.StableDiffusionPipeline.from_pretrained(checkpoints(), variant="fp16")


def test_a_checkpoint_in_one_archive_says_how_to_unpack_it(checkpoints):
    with pytest.raises(UnknownArgument, match=r"dduf_file .* is not in Sfumato; unpack it with `python -m zipfile -e"):
        sfumato.StableDiffusionPipeline.from_pretrained(checkpoints(), dduf_file="model.dduf")


def test_arguments_that_are_not_used_may_be_none(ours):
    assert ours()(PROMPT, num_inference_steps=1, cross_attention_kwargs=None, ip_adapter_image=None).images


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({}, "image is missing"),
        ({"image": "cat.png"}, "image must be a PIL image"),
        ({"image": Image.new("RGB", (16, 16)), "strength": 1.5}, "strength"),
        ({"image": Image.new("RGB", (16, 16)), "strength": 0.0}, "leaves none of the"),
        ({"image": Image.new("RGB", (16, 16)), "strength": 0.1, "num_inference_steps": 5}, "leaves none of the"),
        ({"image": [Image.new("RGB", (16, 16))] * 2}, "got 2 images for a batch"),
        ({"image": Image.new("RGB", (16, 16)), "width": 16}, "no argument 'width'"),
    ],
)
def test_a_wrong_image_call_is_one_sentence(ours, call, says):
    with pytest.raises(UsageError) as caught:
        ours("sd15", sfumato.StableDiffusionImg2ImgPipeline)(PROMPT, **call)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_devices_and_precisions_that_are_not_there(ours):
    pipe = ours()
    with pytest.raises(UsageError, match=r"no device 'cdua'.*did you mean 'cuda'"):
        pipe.to("cdua")
    with pytest.raises(UnknownArgument, match="'divice'"):
        pipe.to(divice="cpu")
    if not torch.backends.mps.is_available():
        with pytest.raises(UsageError, match="device 'mps' is not available"):
            pipe.to("mps")


def test_parts_of_the_wrong_kind(ours, fresh):
    pipe = ours()
    for name, value in (("vae", pipe.unet), ("scheduler", "euler"), ("unet", None)):
        with pytest.raises(UsageError, match=f"^{name} (must be a|is None)"):
            setattr(pipe, name, value)
    with pytest.raises(UsageError, match="safety checker"):
        sfumato.StableDiffusionPipeline(**(pipe.components | {"safety_checker": object()}))


def test_a_scheduler_name_that_does_not_exist(ours):
    with pytest.raises(UnknownArgument, match="did you mean 'euler_a'"):
        ours().generate(GenerateRequest(prompt=PROMPT, scheduler="euler_b", steps=1))


def test_parts_of_two_checkpoints(ours):
    pipe = ours()
    other = sfumato.CLIPTextModel(**(dict(pipe.text_encoder.config.items()) | {"vocab_size": 100})).eval()
    pipe.text_encoder = other
    with pytest.raises(CheckpointError, match="they belong to different checkpoints"):
        pipe(PROMPT)


def test_indexes_that_do_not_fit(checkpoints, tmp_path):
    import json
    import shutil

    def broken(**changes) -> None:
        shutil.copytree(checkpoints(), tmp_path / "c", dirs_exist_ok=True)
        index = json.loads((tmp_path / "c" / "model_index.json").read_text()) | changes
        (tmp_path / "c" / "model_index.json").write_text(json.dumps(index))

    for changes, error, says in (
        ({"unet": ["diffusers", "UNet3DConditionModel"]}, ConfigError, "unet is a UNet3DConditionModel"),
        ({"unet": [None, None]}, CheckpointError, "lists no unet"),
        ({"vae": "text"}, CheckpointError, "lists no vae"),
        ({"_class_name": "StableDiffusion3Pipeline"}, ConfigError, "StableDiffusion3Pipeline is not supported"),
        ({"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}, ConfigError, "scheduler is a FlowMatchEuler"),
    ):
        broken(**changes)
        with pytest.raises(error, match=says) as caught:
            sfumato.DiffusionPipeline.from_pretrained(tmp_path / "c")
        assert "model_index.json" in str(caught.value)
        assert "\n" not in str(caught.value)
        shutil.rmtree(tmp_path / "c")
    with pytest.raises(CheckpointError, match="is one UNet2DConditionModel, not a whole checkpoint"):
        sfumato.DiffusionPipeline.from_pretrained(checkpoints() / "unet")


def edited(folder, target, **changes):
    """A checkpoint with changes to its files: "unet/config.json" to keys and values."""
    import json
    import shutil

    shutil.copytree(folder, target)
    for name, values in changes.items():
        path = target / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | values))
    return target


MISFITS = [
    ({"unet/config.json": {"cross_attention_dim": 32}}, "they belong to different checkpoints|has shape"),
    ({"unet/config.json": {"layers_per_block": 10**8}}, "unet/config.json: layers_per_block must be"),
    ({"text_encoder/config.json": {"num_hidden_layers": 10**8}}, "text_encoder/config.json: num_hidden_layers must be"),
    ({"vae/config.json": {"scaling_factor": "x"}}, "vae/config.json: scaling_factor must be"),
    (
        {"scheduler/scheduler_config.json": {"beta_start": None}},
        "scheduler_config.json: PNDMScheduler: beta_start must be",
    ),
    ({"model_index.json": {"unet": ["diffusers", ["UNet2DConditionModel"]]}}, "lists no unet"),
    ({"model_index.json": {"safety_checker": 5}}, "model_index.json: safety_checker must be"),
    ({"model_index.json": {"_class_name": ["x"]}}, "model_index.json: _class_name must be"),
    ({"sfumato.json": {"steps": "many"}}, "sfumato.json: steps must be a whole number"),
    ({"sfumato.json": {"steps": 10**12}}, "sfumato.json: steps must be at most"),
    ({"words.json": {"styles": ["x"]}}, "words.json: concepts must be"),
    ({"words.json": {"concepts": {"a": "b"}, "styles": ["x"]}}, "words.json: concepts must be"),
    ({"words.json": {"concepts": {"a": []}, "styles": ["x"]}}, "words.json: concepts must be"),
]


@pytest.mark.parametrize(("changes", "says"), MISFITS)
def test_a_checkpoint_that_says_nonsense_is_one_sentence(checkpoints, tmp_path, changes, says):
    folder = edited(checkpoints(), tmp_path / "c", **changes)
    with pytest.raises(SfumatoError, match=says) as caught:
        sfumato.DiffusionPipeline.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1  # the user has typed nothing wrong


def test_an_image_file_that_cannot_be_read(ours, tmp_path):
    (tmp_path / "cat.png").write_text("no")
    with pytest.raises(UsageError, match="cannot be read as an image"):
        ours().generate(GenerateRequest(prompt=PROMPT, image=str(tmp_path / "cat.png")))


@pytest.mark.parametrize(
    ("side", "size", "note"),
    [
        (16, {}, ""),
        (
            32,
            {},
            "the output is 32 × 32, as large as the input image; set width and height for the model's own 16 × 16",
        ),
        (32, {"width": 16, "height": 16}, ""),
        (48, {}, "the image is 48 × 48, far above the 16 × 16 that this model was trained for"),
        (16, {"width": 48, "height": 48}, "the image is 48 × 48, far above"),
    ],
)
def test_the_size_of_an_input_image_is_noted(ours, tmp_path, side, size, note):
    Image.new("RGB", (side, side)).save(tmp_path / "photo.png")
    request = GenerateRequest(prompt=PROMPT, image=str(tmp_path / "photo.png"), steps=2, seed=0, **size)
    notes = ours().generate(request).notes
    assert [said[: len(note)] for said in notes] == ([note] if note else [])


def test_saving_where_there_is_no_place(ours, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        ours().save_pretrained(tmp_path / "file")


# ---- the small modern way -------------------------------------------------------------------------------------------


def test_load_and_generate(checkpoints):
    pipe = sfumato.load(checkpoints(), device="cpu")
    steps = []
    result = pipe.generate(GenerateRequest(prompt=PROMPT, steps=2, seed=1), steps.append)
    assert [(step.number, step.total) for step in steps] == [(1, 3), (2, 3), (3, 3)]  # PNDM's one more
    assert steps[-1].preview()[0].size == (16, 16)
    assert result.request.width == result.request.height == 16
    assert set(result.seconds) == {"prepare", "encode", "denoise", "decode"}
    assert isinstance(sfumato.load(checkpoints(), device="cpu", dtype=torch.bfloat16).dtype, torch.dtype)


def test_a_stream_can_be_left_early(ours):
    stream = ours().stream(GenerateRequest(prompt=PROMPT, steps=5, seed=1))
    next(stream)
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)


def test_a_request_with_a_picture_takes_its_size(ours, tmp_path):
    Image.new("RGB", (24, 40), (200, 10, 10)).save(tmp_path / "a.png")
    request = GenerateRequest(prompt=PROMPT, image=str(tmp_path / "a.png"), steps=4, strength=0.5, seed=2)
    result = ours().generate(request)
    assert result.images[0].size == (24, 40)
    assert "sha256" in result.recipes[0]["image"]
    sized = ours().generate(request.replace(width=16, height=32))
    assert sized.images[0].size == (16, 32)


def test_a_short_scheduler_name_serves_one_request(ours):
    pipe = ours()
    before = pipe.scheduler
    result = pipe.generate(GenerateRequest(prompt=PROMPT, steps=2, seed=1, scheduler="dpmpp_2m_karras"))
    assert pipe.scheduler is before
    described = result.recipes[0]["scheduler"]
    assert described["class"] == "DPMSolverMultistepScheduler"
    assert described["config"]["use_karras_sigmas"] is True


def test_recipes_do_not_depend_on_precision(fresh):
    hashes = {
        fresh(torch_dtype=dtype).generate(GenerateRequest(prompt=PROMPT, steps=1)).recipes[0]["model"]["weights"]
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert len(hashes) == 1


def test_slicing_draws_the_same_picture(ours):
    pipe = ours()
    call = {"num_inference_steps": 2, "output_type": "pt"}
    whole = pipe(PROMPT, generator=generator(), **call).images
    for size in ("auto", "max", 2):
        pipe.enable_attention_slicing(size)
        assert torch.allclose(pipe(PROMPT, generator=generator(), **call).images, whole, atol=1e-4)
    pipe.to("cpu")  # moving does not undo what was asked for
    assert any("sliced" in getattr(m.attention, "__qualname__", "") for m in pipe.unet.attention_modules())
    pipe.disable_attention_slicing()
    assert torch.equal(pipe(PROMPT, generator=generator(), **call).images, whole)


def test_moving_changes_precision_and_returns_the_pipeline(fresh):
    pipe = fresh()
    assert pipe.to(torch.bfloat16) is pipe
    assert pipe.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.bfloat16
    assert pipe.to("cpu", torch.float32).dtype == torch.float32
    assert pipe.to(device="cpu", dtype=torch.float64).dtype == torch.float64
    assert (
        pipe(PROMPT, num_inference_steps=2, output_type="latent", generator=generator()).images.dtype == torch.float64
    )


def test_the_other_pipeline_shares_the_parts(ours):
    pipe = ours()
    other = sfumato.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert other.unet is pipe.unet
    assert other.name == pipe.name


def test_every_error_is_one_of_ours():
    assert issubclass(UnknownArgument, TypeError)
    assert issubclass(UsageError, ValueError)
    assert issubclass(CheckpointError, OSError)
    assert issubclass(NonFiniteError, ArithmeticError)
    assert all(issubclass(error, SfumatoError) for error in (UsageError, CheckpointError, OutputError, ConfigError))


@pytest.mark.parametrize("wrong", [5, "a cat", {"prompt": "a cat"}, torch.zeros(2, 2)])
def test_what_is_no_request(fresh, wrong):
    for call in (fresh().generate, fresh().largest_batch, lambda request: sfumato.load(request=request)):
        with pytest.raises(UsageError, match="expected a GenerateRequest, not") as caught:
            call(wrong)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [{"a": 1}, torch.zeros(2), 5.5])
def test_what_is_no_device_and_no_precision(wrong):
    with pytest.raises(UsageError, match="device must be a name"):
        sfumato.load(device=wrong)
    with pytest.raises(UsageError, match="dtype must be a precision"):
        sfumato.load(dtype=wrong)
