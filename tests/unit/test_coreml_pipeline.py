"""Pipelines over converted models, with backends that compute by the torch networks: the pictures must be torch's."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from sfumato import GenerateRequest
from sfumato.coreml.backends import Chain, Link
from sfumato.coreml.networks import ConvertedAutoencoder, sides
from sfumato.coreml.pipeline import CoreMLPipeline, FixedPlace
from sfumato.errors import CheckpointError, NonFiniteError, UnknownArgument, UsageError
from sfumato.models.attention import Context
from support.converted import Stub, Stubs, feature

PROMPT = "a photo"


def request(**changes) -> GenerateRequest:
    return GenerateRequest(**{"prompt": PROMPT, "steps": 3, "seed": 5} | changes)


def close(a: list[Image.Image], b: list[Image.Image]) -> bool:
    """Whether pictures differ by no more than one step of 8 bits: batches add in another order."""
    pairs = zip(a, b, strict=True)
    return all(np.abs(np.asarray(x, dtype=int) - np.asarray(y, dtype=int)).max() <= 1 for x, y in pairs)


@pytest.fixture
def stubs(ours):
    """`stubs()`: backends over the tiny checkpoint of both tests' pipelines."""
    return lambda shape="sd15", **options: Stubs(ours(shape), **options)


# ---- the same pictures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"guidance_scale": 1.0},
        {"prompt": ("a cat", "red heart", "horse"), "negative_prompt": "photo", "guidance_rescale": 0.5},
        {"count": 2, "rng": "numpy", "scheduler": "euler_a"},
    ],
)
def test_pictures_are_torchs_whatever_the_models_batch(stubs, ours, batch, changes):
    made = stubs(batch=batch)
    result = made.pipeline().generate(request(**changes))
    assert close(result.images, ours().generate(request(**changes)).images)
    rows = result.request.batch_size * (1 if changes.get("guidance_scale") == 1.0 else 2)
    assert len(made.unet.asked) % -(-rows // batch) == 0  # no call more than the rows take
    assert result.plan is None


@pytest.mark.parametrize("shape", ["sd21", "odd"])
def test_other_checkpoints(stubs, ours, shape):
    assert close(stubs(shape).pipeline().generate(request()).images, ours(shape).generate(request()).images)


def test_a_picture_to_start_from(stubs, ours, tmp_path):
    Image.linear_gradient("L").resize((16, 16)).save(tmp_path / "start.png")
    changed = request(image=str(tmp_path / "start.png"), strength=0.7, count=2)
    result = stubs().pipeline().generate(changed)
    assert close(result.images, ours().generate(changed).images)
    assert result.recipes[0]["image"]["sha256"]


def test_a_picture_of_another_shape_is_cut_and_resized(stubs, tmp_path, caplog):
    wide = Image.linear_gradient("L").resize((48, 32))
    wide.paste(255, (0, 0, 8, 32))  # what is cut off
    wide.paste(0, (40, 0, 48, 32))
    wide.save(tmp_path / "wide.png")
    wide.crop((8, 0, 40, 32)).save(tmp_path / "middle.png")
    pipe = stubs().pipeline()
    drawn = [
        pipe.generate(request(image=str(tmp_path / name))).images[0].tobytes() for name in ("wide.png", "middle.png")
    ]
    assert drawn[0] == drawn[1]
    told = [record.getMessage() for record in caplog.records]
    assert told == ["the input image is 48 × 32, but the models need 16 × 16; it was cropped to that shape"]


def test_the_ecosystems_call_and_previews(stubs, ours):
    pipe = stubs().pipeline()
    generator = torch.Generator().manual_seed(0)
    image = pipe(PROMPT, num_inference_steps=2, generator=generator).images[0]
    expected = ours()(PROMPT, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert close([image], [expected])
    previews: list[Image.Image] = []
    pipe.generate(request(scheduler="ddim"), lambda step: previews.extend(step.preview()))
    assert [preview.size for preview in previews] == [(16, 16)] * 3


# ---- what the models are asked --------------------------------------------------------------------------------------


def test_rows_fill_the_batch_and_the_last_call_is_filled_up(stubs):
    made = stubs(batch=2)
    unet = made.pipeline().unet
    x, states = torch.randn(3, 4, 8, 8), torch.randn(3, 20, 24)
    whole = unet(x, torch.tensor([9.0, 5.0, 2.0]), states).sample
    assert whole.shape == x.shape
    assert [call["timestep"].tolist() for call in made.unet.asked] == [[9, 5], [2, 2]]
    np.testing.assert_array_equal(made.unet.asked[1]["sample"], x[[2, 2]])
    np.testing.assert_array_equal(made.unet.asked[0]["encoder_hidden_states"][:, :, 0], states[:2].transpose(1, 2))
    alone = unet(x[1:2], 5, states[1:2], return_dict=False)[0]
    assert torch.allclose(whole[1:2], alone, atol=1e-5)
    # The halves of guidance share the sample.
    halves = unet(x[:1], unet.moment(x[:1], 9), Context(states[:2])).sample
    assert torch.allclose(halves[:1], whole[:1], atol=1e-5)


def test_half_precision_is_what_the_interface_asks_for(stubs, caplog):
    made = stubs(dtype="fp16")
    pipe = made.pipeline()
    pipe.generate(request(scheduler="ddim"))
    assert caplog.records == []
    assert {call["sample"].dtype for call in made.unet.asked} == {np.dtype(np.float16)}
    pipe.generate(request(scheduler="lms_karras"))
    pipe.generate(request(scheduler="lms_karras"))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert "reads timesteps in half precision: " in told[0]


def test_prompts_are_encoded_one_at_a_time(stubs):
    made = stubs()
    made.pipeline().generate(request(prompt=("a cat", "red heart"), steps=1))
    assert [call["input_ids"].shape for call in made.text.asked] == [(1, 20)] * 4  # each with its negative one
    assert made.text.asked[0]["input_ids"].dtype == np.float32


def test_images_are_decoded_one_at_a_time(stubs):
    made = stubs()
    made.pipeline().generate(request(count=3))
    assert len(made.decoder.asked) == 3


# ---- what is refused or said ----------------------------------------------------------------------------------------


def test_one_size(stubs):
    pipe = stubs("odd").pipeline()
    assert pipe.size_of(request()) == (40, 24)
    assert pipe.generate(request(width=40, height=24)).images[0].size == (40, 24)
    for changes in ({"width": 24}, {"height": 40}, {"width": 400, "height": 240}):
        with pytest.raises(UsageError, match="only generate images of 40 × 24"):
            pipe.generate(request(**changes))
    with pytest.raises(UsageError, match="only generate images of 40 × 24, not 48 × 24"):
        pipe(PROMPT, latents=torch.randn(1, 4, 6, 12))


def test_what_a_converted_network_cannot_do(stubs, tmp_path):
    pipe = stubs().pipeline(encoder=False)
    with pytest.raises(UsageError, match="clip_skip needs inner layers"):
        pipe.generate(request(clip_skip=1))
    with pytest.raises(UsageError, match="choose a compute unit when loading them"):
        pipe.to("cpu")
    for refused in (lambda: pipe.unet.half(), lambda: pipe.vae.to("cpu"), lambda: pipe.text_encoder.float()):
        with pytest.raises(UsageError, match="cannot be moved or cast"):
            refused()
    for refused in (pipe.enable_attention_slicing, lambda: pipe.unet.set_attention_slice("max")):
        with pytest.raises(UsageError, match="was fixed by its conversion"):
            refused()
    with pytest.raises(UsageError, match="cannot be saved as a checkpoint"):
        pipe.save_pretrained(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(UsageError, match="no weights to save"):
        pipe.unet.save_pretrained(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="do not enable tiling"):
        pipe.vae.enable_tiling()
    x, states = torch.randn(1, 4, 8, 8), torch.randn(1, 20, 24)
    with pytest.raises(UsageError, match="no attention masks"):
        pipe.unet(x, 1, states, encoder_attention_mask=torch.ones(1, 20))
    with pytest.raises(UsageError, match="no class_labels"):
        pipe.unet(x, 1, states, class_labels=torch.ones(1))
    with pytest.raises(UsageError, match="no attention_mask"):
        pipe.text_encoder(torch.zeros(1, 20, dtype=torch.long), torch.ones(1, 20))
    with pytest.raises(UnknownArgument, match=r"without 'torch_dtype'.*compute_unit"):
        CoreMLPipeline.from_pretrained("nowhere", torch_dtype=torch.float16)


def test_no_encoder(stubs, tmp_path):
    Image.linear_gradient("L").resize((16, 16)).save(tmp_path / "start.png")
    with pytest.raises(UsageError, match=r"image-to-image needs a VAE encoder.*--convert-vae-encoder"):
        stubs().pipeline(encoder=False).generate(request(image=str(tmp_path / "start.png")))


def test_values_that_are_not_finite_are_named_with_what_helps(stubs):
    made = stubs()
    pipe = made.pipeline()
    made.unet.compute = lambda sample, **_: {"noise_pred": np.full_like(sample, np.inf)}
    with pytest.raises(NonFiniteError, match=r"U-Net, step 1 of 3: .*--compute-unit CPU_ONLY"):
        pipe.generate(request(scheduler="ddim"))


def test_sizes_that_are_not_fixed():
    open_ended = Stub([feature("z", (1, 4, None, 8))], [feature("image", (1, 3, 16, 16))], None).chain
    with pytest.raises(CheckpointError, match="'z' has no fixed size"):
        sides(open_ended, "z")
    with pytest.raises(CheckpointError, match="has no input 'x'"):
        ConvertedAutoencoder(
            sfumato.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).config, open_ended, open_ended
        ).encode(torch.zeros(1, 3, 8, 8))


def test_notes_are_in_every_result_and_once_in_the_log(stubs, caplog):
    pipe = stubs().pipeline()
    pipe.place = FixedPlace("the CPU computes")
    with caplog.at_level(logging.WARNING, "sfumato"):
        results = [pipe.generate(request()) for _ in range(2)]
    assert [result.notes for result in results] == [("the CPU computes",)] * 2
    assert results[1].recipes[0]["notes"] == ["the CPU computes"]
    assert [record.getMessage() for record in caplog.records] == ["the CPU computes"]


def test_recipes_say_which_models_drew(stubs):
    pipe = stubs().pipeline()
    pipe.name, pipe.details = "folder", {"engine": "portable", "compute_unit": "ALL"}
    recipe = pipe.generate(request()).recipes[0]
    assert recipe["coreml"] == pipe.details
    assert recipe["model"]["name"] == "folder"
    assert len(recipe["model"]["weights"]) == 32


def test_largest_batch(stubs):
    pipe = stubs(batch=2).pipeline()
    assert pipe.largest_batch(request()) == 1
    assert pipe.largest_batch(request(guidance_scale=1)) == 2
    assert stubs(batch=1).pipeline().largest_batch(request()) == 1


def test_the_encoder_is_opened_only_for_a_picture_to_start_from(stubs, tmp_path):
    made = stubs()
    pipe, opened = made.pipeline(), []
    pipe.vae.encoding = Chain([Link(made.encoder.interface, lambda: opened.append("encoder") or made.encoder)])
    for network in (pipe.text_encoder, pipe.unet, pipe.vae):
        network.load()
    pipe.generate(request())
    assert opened == []
    Image.linear_gradient("L").resize((16, 16)).save(tmp_path / "start.png")
    pipe.generate(request(image=str(tmp_path / "start.png")))
    assert opened == ["encoder"]


@pytest.mark.parametrize("spare", [True, False])
def test_reduced_memory_holds_one_network_at_a_time(stubs, spare):
    made = stubs()
    pipe = made.pipeline()
    opened: list[str] = []
    held: set[str] = set()

    class Counted(Chain):
        def release(self):
            held.difference_update(name for link, name in zip(self._links, [self.name], strict=True))
            super().release()

    def counted(name, stub):
        def open_() -> Stub:
            opened.append(name)
            held.add(name)
            assert len(held) == 1 or not spare
            return stub

        chain = Counted([Link(stub.interface, open_)])
        chain.name = name
        return chain

    pipe.text_encoder.chain = counted("text", made.text)
    pipe.unet.chain = counted("unet", made.unet)
    pipe.vae.decoding = counted("decoder", made.decoder)
    pipe.place = FixedPlace(reduce_memory=spare)
    pipe.generate(request())
    assert opened == ["text", "unet", "decoder"]
    pipe.generate(request())
    assert len(opened) == (6 if spare else 3)
    assert held == (set() if spare else {"text", "unet", "decoder"})
