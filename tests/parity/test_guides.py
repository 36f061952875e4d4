"""Every call of the first two guides (reference/guides.md), with `sfumato` where they say `diffusers`.

A small random checkpoint answers to the hub ids, from a cache that is laid out like the real one; the CPU stands in for
"cuda" and "mps". Nothing else is changed.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file

from support.hub import FakeHub, cache

IDS = (
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-v1-5",
    "CompVis/stable-diffusion-v1-4",
)
VAE_ID = "stabilityai/sd-vae-ft-mse"
DEVICE = "cpu"
PROMPT = "a photo of an astronaut"


@pytest.fixture
def hub_cache(checkpoints, tmp_path, monkeypatch, no_network) -> Path:
    """The hub ids of the guides in a cache, in both precisions, and nothing to be reached."""
    import huggingface_hub.constants

    folder = tmp_path / "both"
    shutil.copytree(checkpoints("sd15"), folder)
    for file in folder.rglob("*.safetensors"):
        halves = {key: value.half() for key, value in load_file(file).items()}
        save_file(halves, file.with_suffix(".fp16.safetensors"))
    for repo in IDS:
        cache(tmp_path / "hub", repo, folder)
    cache(tmp_path / "hub", VAE_ID, folder / "vae", ["config.json", "diffusion_pytorch_model.safetensors"])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    FakeHub(monkeypatch, tmp_path / "hub", {})
    return tmp_path / "hub"


@pytest.fixture
def pipeline(hub_cache):
    from sfumato import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(IDS[0], use_safetensors=True).to(DEVICE)


class TestMetalPerformanceShaders:
    @pytest.mark.parametrize("model", IDS)
    def test_load_move_slice_prime_and_draw(self, hub_cache, model):
        from sfumato import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(model)
        pipe = pipe.to(DEVICE)
        pipe.enable_attention_slicing()
        _ = pipe(PROMPT, num_inference_steps=1)
        image = pipe(PROMPT, num_inference_steps=2).images[0]
        assert isinstance(image, PIL.Image.Image)
        assert image._repr_png_().startswith(b"\x89PNG")  # what a notebook shows

    def test_half_precision_files(self, hub_cache):
        from sfumato import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(
            IDS[0], torch_dtype=torch.float16, variant="fp16", use_safetensors=True
        ).to(DEVICE)
        assert pipe.dtype == torch.float16

    def test_the_priming_pass_changes_nothing(self, pipeline):
        """SPEC A6: results of the first and of later calls are equal."""

        def draw():
            return pipeline(PROMPT, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt")

        first = draw().images
        _ = pipeline(PROMPT, num_inference_steps=1)
        assert torch.equal(draw().images, first)

    def test_a_stored_login_is_used_for_gated_checkpoints(self, checkpoints, tmp_path, monkeypatch):
        """The token argument stays None, which is how the hub's own client is told to use what its login stored."""
        from sfumato import DiffusionPipeline

        hub = FakeHub(monkeypatch, tmp_path / "hub", {"owner/gated": checkpoints("sd15")})
        DiffusionPipeline.from_pretrained("owner/gated", cache_dir=tmp_path / "hub")
        DiffusionPipeline.from_pretrained("owner/gated", cache_dir=tmp_path / "hub", token="hf_x", force_download=True)
        assert hub.tokens == [None, "hf_x"]


def get_inputs(batch_size: int = 1) -> dict[str, object]:
    """The helper that the second guide writes."""
    generator = [torch.Generator(DEVICE).manual_seed(i) for i in range(batch_size)]
    return {"prompt": batch_size * [PROMPT], "generator": generator, "num_inference_steps": 20}


class TestEffectiveAndEfficient:
    def test_a_seed(self, pipeline):
        generator = torch.Generator(DEVICE).manual_seed(0)
        image = pipeline(PROMPT, generator=generator).images[0]
        generator = torch.Generator(DEVICE).manual_seed(0)
        again = pipeline(PROMPT, generator=generator).images[0]
        assert image.tobytes() == again.tobytes()
        assert image.size == (16, 16)

    def test_compatible_schedulers(self, pipeline):
        names = {cls.__name__ for cls in pipeline.scheduler.compatibles}
        assert names >= {
            "LMSDiscreteScheduler", "UniPCMultistepScheduler", "KDPM2DiscreteScheduler", "DEISMultistepScheduler",
            "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "DDPMScheduler", "DPMSolverSinglestepScheduler",
            "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler", "HeunDiscreteScheduler", "PNDMScheduler",
            "EulerAncestralDiscreteScheduler", "DDIMScheduler",
        }  # fmt: skip
        assert all(isinstance(cls, type) for cls in pipeline.scheduler.compatibles)

    def test_another_scheduler_and_20_steps(self, pipeline):
        from sfumato import DPMSolverMultistepScheduler

        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
        generator = torch.Generator(DEVICE).manual_seed(0)
        image = pipeline(PROMPT, generator=generator, num_inference_steps=20).images[0]
        assert isinstance(image, PIL.Image.Image)
        assert pipeline.scheduler.config.beta_schedule == "scaled_linear"  # taken over from the checkpoint's own

    def test_batches_and_a_grid(self, pipeline):
        from sfumato.utils import make_image_grid

        images = pipeline(**get_inputs(batch_size=4)).images
        assert make_image_grid(images, 2, 2).size == (32, 32)
        pipeline.enable_attention_slicing()
        images = pipeline(**get_inputs(batch_size=8)).images
        assert make_image_grid(images, rows=2, cols=4).size == (64, 32)
        assert len({image.tobytes() for image in images}) == 8

    def test_another_autoencoder(self, pipeline):
        from sfumato import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(VAE_ID, torch_dtype=torch.float16).to(DEVICE)
        pipeline.vae = vae
        assert pipeline.vae is vae
        assert len(pipeline(**(get_inputs(batch_size=2) | {"num_inference_steps": 2})).images) == 2

    def test_a_prompt_that_grows_and_four_prompts_with_one_seed(self, pipeline):
        prompt = "a photo"
        prompt += ", of an astronaut"
        prompt += " on a red horse"
        prompts = [prompt, "the cat", "the horse", "the red heart"]
        generator = [torch.Generator(DEVICE).manual_seed(1) for _ in range(len(prompts))]
        images = pipeline(prompt=prompts, generator=generator, num_inference_steps=25).images
        assert len(images) == 4
        alone = pipeline(prompts[1], generator=torch.Generator(DEVICE).manual_seed(1), num_inference_steps=25).images[0]
        difference = max(abs(a - b) for a, b in zip(images[1].tobytes(), alone.tobytes(), strict=True))
        assert difference <= 1  # a batch adds in another order, which may tip a rounding
