"""Stable Diffusion XL in our own words: families told apart, requests, plans, folders, and what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from sfumato import Framing, GenerateRequest
from sfumato.checkpoints.family import family_of, settings_of
from sfumato.errors import CheckpointError, ConfigError, NonFiniteError, UnknownArgument, UsageError
from sfumato.families import FAMILIES
from sfumato.pipelines.conditioning import Conditioning
from sfumato.pipelines.sizes import read_sizes
from sfumato.pipelines.source import Folder
from sfumato.pipelines.stages import tell_sizes
from sfumato.pipelines.summary import summarize
from support.compare import distance, generator

PROMPT = "a photo of a cat"


def request(**changes) -> GenerateRequest:
    return GenerateRequest(**{"prompt": PROMPT, "steps": 2, "seed": 3} | changes)


def pixels(result) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.int16) for image in result.images])


def edit(folder, name: str, **changes) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- families -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "called", "changes", "family", "settings"),
    [
        ("sdxl", "mine", {}, "sdxl", (50, 5.0)),
        ("refiner", "mine", {}, "sdxl-refiner", (50, 5.0)),
        ("sd15", "mine", {}, "sd15", (50, 7.5)),
        ("turbo", "sdxl-turbo", {}, "sdxl-turbo", (1, 0.0)),
        ("turbo", "SDXL-Lightning_8step", {}, "sdxl-lightning", (8, 0.0)),
        ("turbo", "mine", {"unet/config.json": {"sample_size": 64}}, "sdxl-turbo", (1, 0.0)),
        ("pruned", "mine", {"vae/config.json": {"latents_mean": None, "latents_std": None}}, "sdxl", (50, 5.0)),
        ("pruned", "mine", {}, "playground", (50, 3.0)),
        ("sd21", "mine", {}, "sd21", (50, 7.5)),
    ],
)
def test_a_folder_says_which_family_it_is_of(shape, called, changes, family, settings, checkpoints, tmp_path):
    folder = tmp_path / called
    shutil.copytree(checkpoints(shape), folder)
    for name, values in changes.items():
        edit(folder, name, **values)
    assert family_of(folder).name == family
    assert Folder(folder, "").settings == {"steps": settings[0], "guidance_scale": settings[1]}
    (folder / "sfumato.json").write_text('{"steps": 7}')
    assert Folder(folder, "").settings == {"steps": 7, "guidance_scale": settings[1]}
    snapshot = tmp_path / f"models--somebody--{called}" / "snapshots" / "0123"
    shutil.copytree(folder, snapshot)
    assert family_of(snapshot).name == family


def test_what_a_request_leaves_open_is_the_familys(checkpoints, tmp_path):
    folder = tmp_path / "sdxl-turbo"
    shutil.copytree(checkpoints("turbo"), folder)
    pipe = sfumato.load(folder, device="cpu")
    result = pipe.generate(GenerateRequest(prompt=PROMPT, seed=3))
    assert (result.request.steps, result.request.guidance_scale, result.plan.steps) == (1, 0.0, 1)
    assert np.array_equal(pixels(result), pixels(pipe.generate(request(steps=1, guidance_scale=1.0))))
    asked = pipe.generate(request(steps=3, guidance_scale=2.0)).request
    assert (asked.steps, asked.guidance_scale) == (3, 2.0)
    assert sfumato.StableDiffusionXLPipeline(**pipe.components).parts.settings == settings_of(FAMILIES["sdxl"])


def test_what_an_index_says_of_a_family_holds(checkpoints, tmp_path, caplog):
    folder = tmp_path / "c"
    shutil.copytree(checkpoints("sdxl"), folder)
    load = sfumato.DiffusionPipeline.from_pretrained
    assert load(folder).parts.family.absent_negative == "zeros"
    assert load(folder, force_zeros_for_empty_prompt=False).parts.family.absent_negative == "empty"
    edit(folder, "model_index.json", force_zeros_for_empty_prompt=False, requires_aesthetics_score=True)
    parts = load(folder).parts
    assert parts.family.absent_negative == "empty"
    assert parts.family.sizes[-1] == "target_size"  # as the U-Net was made, whatever the index says
    assert "has no input for an aesthetic score" in caplog.text
    load(folder).save_pretrained(tmp_path / "again")
    assert load(tmp_path / "again").parts.family == parts.family


# ---- sizes ----------------------------------------------------------------------------------------------------------


def ids(pipe, request: GenerateRequest, branches: int = 2) -> list[list[float]]:
    text = Conditioning((torch.zeros(2, 3, 64),) * branches)
    told = tell_sizes(pipe.parts, request, (24, 40), text)
    assert [rows.shape[0] for rows in told.sizes] == [2] * branches
    assert all(torch.equal(rows[0], rows[1]) for rows in told.sizes)
    return [rows[0].tolist() for rows in told.sizes]


def test_sizes_are_height_first_and_the_negative_ones_fall_back(ours):
    base, refiner = ours("sdxl"), ours("refiner")
    own = [40, 24, 0, 0, 40, 24]
    assert ids(base, request()) == [own, own]
    assert ids(base, request(), branches=1) == [own]
    framed = request(framing=Framing(original_size=(1, 2), crops_coords_top_left=(3, 4)))
    assert ids(base, framed) == [[1, 2, 3, 4, 40, 24]] * 2
    negative = framed.replace(negative_framing=Framing(target_size=(7, 8), crops_coords_top_left=(0, 0)))
    assert ids(base, negative) == [[1, 2, 0, 0, 7, 8], [1, 2, 3, 4, 40, 24]]
    assert ids(refiner, request()) == [[40, 24, 0, 0, 2.5], [40, 24, 0, 0, 6.0]]
    scored = request(framing=Framing(aesthetic_score=9), negative_framing=Framing(aesthetic_score=1))
    assert ids(refiner, scored) == [[40, 24, 0, 0, 1], [40, 24, 0, 0, 9]]
    assert tell_sizes(ours("sd15").parts, request(), (24, 40), Conditioning((torch.zeros(1, 3, 24),))).sizes == ()


def test_sizes_do_not_round_in_half_precision(checkpoints):
    pipe = sfumato.DiffusionPipeline.from_pretrained(checkpoints("sdxl"), torch_dtype=torch.bfloat16)
    assert ids(pipe, request(framing=Framing(original_size=(1027, 1025))))[1][:2] == [1027, 1025]


# ---- requests, pictures and recipes ---------------------------------------------------------------------------------


def test_a_request_is_drawn_alone_as_among_others_and_again_from_its_recipe(checkpoints):
    pipe = sfumato.load(checkpoints("sdxl"), device="cpu", dtype=torch.float32)
    whole = request(
        prompt=(PROMPT, "the red heart"),
        prompt_2=("a horse", "a cat"),
        negative_prompt_2="red",
        negative_prompt="",
        framing=Framing(original_size=(300, 200)),
        negative_framing=Framing(target_size=(3, 5)),
        count=2,
    )
    result = pipe.generate(whole)
    for picture, recipe in zip(result.images, result.recipes, strict=True):
        told = GenerateRequest.from_dict(json.loads(json.dumps(recipe["request"])))
        assert isinstance(told.prompt_2, str)
        again = pipe.generate(told)
        assert np.abs(pixels(again)[0] - np.asarray(picture, dtype=np.int16)).max() <= 1
        assert again.recipes[0]["request"] == recipe["request"]
        assert again.recipes[0]["model"] == recipe["model"]


def test_micro_batches_change_no_picture(checkpoints):
    whole = request(prompt=(PROMPT, "the red heart", PROMPT), guidance_scale=3.0)
    folder = checkpoints("sdxl")
    pictures = [
        pixels(sfumato.load(folder, device="cpu", dtype=torch.float32, micro_batch=size).generate(whole))
        for size in (1, 2, 3)
    ]
    assert all(np.abs(one - pictures[0]).max() <= 1 for one in pictures)


def test_the_second_encoder_draws_otherwise_and_its_absence_is_said(ours):
    pipe = ours("sdxl")
    plain, other = (pipe.generate(request(prompt_2=text)).images[0] for text in (None, "a red horse"))
    assert not np.array_equal(np.asarray(plain), np.asarray(other))
    assert np.array_equal(np.asarray(pipe.generate(request(prompt_2=PROMPT)).images[0]), np.asarray(plain))
    notes = ours("sd15").generate(request(prompt_2="a horse")).notes
    assert notes == ("prompt_2 and negative_prompt_2 have no effect: this checkpoint has no second text encoder",)


def test_a_schedule_that_starts_from_pure_noise_needs_another_prediction(ours):
    pipe = ours("sd15")
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipe.scheduler = sfumato.EulerDiscreteScheduler.from_config(pipe.scheduler.config, **options)
    (note,) = pipe.generate(request()).notes
    assert "rescale_betas_zero_snr" in note
    assert "prediction_type to 'v_prediction'" in note
    pipe.scheduler = sfumato.EulerDiscreteScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    assert pipe.generate(request()).notes == ()


def test_a_picture_file_is_redrawn_with_the_sizes_of_its_own(checkpoints, tmp_path):
    Image.new("RGB", (24, 16), "red").save(tmp_path / "red.png")
    for shape in ("sdxl", "refiner"):
        pipe = sfumato.load(checkpoints(shape), device="cpu")
        result = pipe.generate(request(image=str(tmp_path / "red.png"), strength=0.6, steps=4))
        assert result.images[0].size == (24, 16)


# ---- plans and places -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["sdxl", "refiner"])
def test_networks_that_take_turns_draw_the_same(shape, checkpoints, tmp_path):
    folder = checkpoints(shape)
    kept = sfumato.load(folder, device="cpu", dtype=torch.float32, engine="torch")
    staged = sfumato.load(folder, device="cpu", dtype=torch.float32, offload="staged")
    image = {"image": str(tmp_path / "blue.png"), "strength": 0.8, "steps": 3} if shape == "refiner" else {}
    if image:
        Image.new("RGB", (16, 16), "blue").save(image["image"])
    for _ in range(2):
        assert {network.device.type for network in staged.parts.networks.values()} == {"meta"}
        result = staged.generate(request(**image))
        assert np.abs(pixels(result) - pixels(kept.generate(request(**image)))).max() <= 1
    assert result.plan.offload == "staged"
    assert result.recipes[0]["model"] == kept.generate(request(**image)).recipes[0]["model"]


def test_a_folder_is_counted_with_both_text_encoders(checkpoints):
    for shape, count in (("sdxl", 2), ("refiner", 1)):
        sizes, parts = (
            read_sizes(checkpoints(shape)),
            sfumato.DiffusionPipeline.from_pretrained(checkpoints(shape)).parts,
        )
        assert len(sizes.text_encoder_configs) == count
        numbers = sum(value.numel() for one in parts.encoders for value in one.parameters())
        assert (sizes.text_encoder.parameters, sizes.text_encoder.stored_bytes) == (numbers, 4 * numbers)
        told = summarize(checkpoints(shape))
        roles = [part for part in told["parts"] if part.startswith("text_encoder")]
        assert roles == ["text_encoder", "text_encoder_2"][-count:]
        assert told["parameters"] == sum(value.numel() for one in parts.networks.values() for value in one.parameters())
        assert told["prompt_tokens"] == 20


def test_precisions_and_devices_reach_all_networks(checkpoints):
    half = sfumato.DiffusionPipeline.from_pretrained(checkpoints("sdxl"), torch_dtype=torch.bfloat16)
    assert {network.dtype for network in half.parts.networks.values()} == {torch.bfloat16}
    half.to(torch.float64)
    assert {network.dtype for network in half.parts.networks.values()} == {torch.float64}
    mixed = {"text_encoder_2": torch.float16, "default": torch.float32}
    pipe = sfumato.DiffusionPipeline.from_pretrained(checkpoints("sdxl"), torch_dtype=mixed)
    assert (pipe.text_encoder.dtype, pipe.text_encoder_2.dtype) == (torch.float32, torch.float16)


def test_half_precision_draws_nearly_the_same(checkpoints):
    call = {"num_inference_steps": 3, "output_type": "latent"}
    exact = sfumato.DiffusionPipeline.from_pretrained(checkpoints("sdxl"))(PROMPT, generator=generator(), **call).images
    for dtype, most in ((torch.bfloat16, 0.1), (torch.float16, 0.02), (torch.float64, 1e-4)):
        pipe = sfumato.DiffusionPipeline.from_pretrained(checkpoints("sdxl"), torch_dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
        result = pipe(PROMPT, generator=generator(), **call).images
        assert result.dtype == dtype
        assert distance(result, exact) < most


def test_an_encoder_that_leaves_its_range_is_named(checkpoints):
    pipe = sfumato.DiffusionPipeline.from_pretrained(checkpoints("sdxl"))
    state = pipe.text_encoder_2.state_dict()
    pipe.text_encoder_2.load_state_dict(
        state | {"text_projection.weight": state["text_projection.weight"] * float("nan")}
    )
    with pytest.raises(CheckpointError, match=r"^text encoder 2: the weight 'text_projection\.weight'"):
        pipe(PROMPT)
    embeds, pooled = torch.zeros(1, 20, 64), torch.full((1, 40), float("nan"))
    with pytest.raises(NonFiniteError, match=r"^prompt embeddings"):
        pipe(prompt_embeds=embeds, pooled_prompt_embeds=pooled)


# ---- folders and bad input ------------------------------------------------------------------------------------------


def test_a_refiner_whose_encoder_stands_in_the_first_place_is_read(checkpoints, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(checkpoints("refiner"), folder)
    expected = sfumato.DiffusionPipeline.from_pretrained(folder)
    for name in ("text_encoder", "tokenizer"):
        (folder / f"{name}_2").rename(folder / name)
    index = json.loads((folder / "model_index.json").read_text())
    swapped = {name: index[f"{name}_2"] for name in ("text_encoder", "tokenizer")}
    edit(folder, "model_index.json", **swapped, text_encoder_2=[None, None], tokenizer_2=[None, None])
    pipe = sfumato.DiffusionPipeline.from_pretrained(folder)
    call = {"image": torch.zeros(1, 4, 8, 8), "num_inference_steps": 4, "output_type": "latent"}
    a, b = (one(PROMPT, generator=generator(), **call).images for one in (pipe, expected))
    assert torch.equal(a, b)


def test_folders_that_do_not_fit(checkpoints, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(checkpoints("sdxl"), folder)
    load = sfumato.DiffusionPipeline.from_pretrained
    assert load(folder, text_encoder=None, tokenizer=None).text_encoder is None
    edit(folder, "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    with pytest.raises(ConfigError, match=r"cross_attention_dim = 64, text_encoder_2/config\.json hidden_size = 40"):
        load(folder)
    edit(folder, "model_index.json", text_encoder_2=["transformers", "T5EncoderModel"])
    with pytest.raises(ConfigError, match="text_encoder_2 is a T5EncoderModel, which is not supported"):
        load(folder)
    edit(folder, "model_index.json", _class_name="StableDiffusionPipeline", text_encoder_2=[None, None])
    with pytest.raises(UsageError, match="StableDiffusionPipeline does not support Stable Diffusion XL"):
        load(folder)


def test_wrong_arguments_are_one_sentence(ours):
    pipe, image = ours("sdxl"), ours("sdxl", sfumato.StableDiffusionXLImg2ImgPipeline)
    embeds, pooled = torch.zeros(1, 20, 64), torch.zeros(1, 40)
    for call, says in (
        ({"prompt_2": "cat"}, "the prompt is missing"),
        ({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "prompt_2": "cat"}, "pass one of them"),
        ({"prompt": "cat", "negative_prompt_embeds": embeds, "negative_prompt_2": "red"}, "cannot be combined"),
        ({"prompt": "cat", "negative_prompt_embeds": embeds}, "also needs pooled embeddings"),
        ({"prompt": ["cat", "dog"], "pooled_prompt_embeds": pooled}, "2 prompts and 1 pooled_prompt_embeds"),
        ({"prompt": "cat", "pooled_prompt_embeds": embeds}, r"pooled_prompt_embeds must have the shape \(P, C\)"),
        ({"prompt": ["cat"], "prompt_2": ["a", "b"]}, "got 2 for 1 prompt"),
        ({"prompt": "cat", "original_size": 5}, "original_size must be a list of 2 whole numbers"),
        ({"prompt": "cat", "denoising_end": 1.5}, "denoising_end must be a number from 0 to 1"),
        ({"prompt": "cat", "clip_skip": 3}, "clip_skip must be from 0 to 1"),
    ):
        with pytest.raises(UsageError, match=says):
            pipe(**call)
    with pytest.raises(UsageError, match="image is missing"):
        image("cat")
    with pytest.raises(UnknownArgument, match=r"no argument 'denoising_start' \(did you mean 'denoising_end'"):
        pipe("cat", denoising_start=0.5)
    with pytest.raises(UsageError, match="no watermark"):
        sfumato.StableDiffusionXLPipeline(**pipe.components, add_watermarker=True)
    with pytest.raises(UnknownArgument, match="from_pipe has no argument 'unett'"):
        sfumato.StableDiffusionXLImg2ImgPipeline.from_pipe(pipe, unett=pipe.unet)


def test_text_encoders_of_another_checkpoint_are_refused(ours):
    pipe = ours("sdxl")
    other = sfumato.CLIPTextModelWithProjection(**pipe.text_encoder_2.config.to_dict() | {"projection_dim": 16})
    with pytest.raises(UsageError, match="no family combines with a text encoder that gives 16"):
        pipe.text_encoder_2 = other


def test_what_core_ml_cannot_convert_is_refused(checkpoints):
    from sfumato.coreml.source import open_source

    for shape in ("sdxl", "refiner"):
        with pytest.raises(ConfigError, match="only checkpoints with one text encoder can be converted"):
            open_source(checkpoints(shape))


# ---- a refiner ------------------------------------------------------------------------------------------------------


def test_a_refiner_goes_on_where_the_base_leaves_off(checkpoints, ours):
    whole = request(steps=5, refiner=str(checkpoints("refiner")), prompt_2="red")
    pipe = sfumato.load(checkpoints("sdxl"), device="cpu", dtype=torch.float32, request=whole)
    seen = []
    result = pipe.generate(whole, lambda step: seen.append((step.number, step.total)))
    assert seen == [(number, 5) for number in range(1, 6)]
    assert result.request.denoising_end == 0.8
    base, image = ours("sdxl"), ours("refiner", sfumato.StableDiffusionXLImg2ImgPipeline)
    call = {"prompt": PROMPT, "num_inference_steps": 5, "generator": generator(3)}
    left = base(denoising_end=0.8, prompt_2="red", output_type="latent", **call).images
    same = image(denoising_start=0.8, image=left, **call).images[0]
    assert np.abs(pixels(result)[0] - np.asarray(same, dtype=np.int16)).max() <= 1
    (recipe,) = result.recipes
    assert recipe["refiner"]["name"] == str(checkpoints("refiner"))
    assert recipe["refiner"]["weights"] != recipe["model"]["weights"]
    again = pipe.generate(GenerateRequest.from_dict(json.loads(json.dumps(recipe["request"]))))
    assert np.array_equal(pixels(again), pixels(result))


@pytest.mark.parametrize("scheduler", ["heun", "unipc", "ddim"])
def test_all_steps_are_counted_whoever_takes_them(scheduler, checkpoints):
    whole = request(steps=6, refiner=str(checkpoints("refiner")), denoising_end=0.5, scheduler=scheduler, count=2)
    pipe = sfumato.load(checkpoints("sdxl"), device="cpu", dtype=torch.float32, request=whole)
    seen = [(step.number, step.total, step.preview()[0].size) for step in pipe.stream(whole)]
    assert [number for number, _, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for _, total, _ in seen} == {len(seen)}
    assert {size for *_, size in seen} == {(16, 16)}


def test_a_refiner_that_cannot_take_over(checkpoints, ours):
    with pytest.raises(UsageError, match="between the first and the last step, not at 1"):
        request(refiner="x", denoising_end=1.0)
    with pytest.raises(UsageError, match="needs a refiner, which is not loaded"):
        ours("sdxl").generate(request(refiner=str(checkpoints("refiner"))))
    for other, words in (("sd15", "scaling_factor 0.18215 and 0.13025"), ("pruned", "scaling_factor 0.5 and 0.13025")):
        whole = request(refiner=str(checkpoints(other)))
        pipe = sfumato.load(checkpoints("sdxl"), device="cpu", request=whole)
        with pytest.raises(UsageError, match=words):
            pipe.generate(whole)


def test_a_refiner_without_room_beside_takes_turns_with_the_base(checkpoints, monkeypatch):
    from sfumato.pipelines import loading

    monkeypatch.setattr(loading, "fits_beside", lambda one, other: False)
    whole = request(refiner=str(checkpoints("refiner")))
    pipe = sfumato.load(checkpoints("sdxl"), device="cpu", dtype=torch.float32, request=whole)
    assert pipe.refiner is not None
    assert pipe.place.wishes.offload == pipe.refiner.place.wishes.offload == "staged"
    apart = pipe.generate(whole)
    assert pipe.unet.device.type == pipe.refiner.unet.device.type == "meta"
    monkeypatch.undo()
    together = sfumato.load(checkpoints("sdxl"), device="cpu", dtype=torch.float32, request=whole)
    assert np.array_equal(pixels(apart), pixels(together.generate(whole)))
