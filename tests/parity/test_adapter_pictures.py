"""Pictures with adapters and embeddings against the reference's, for what it supports."""

from __future__ import annotations

import pytest
import torch

from support.adapters import kohya, random_lora
from support.compare import FLOAT32, distance, generator

pytest.importorskip("peft", reason="peft is of the extra 'test'")
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
CALL = {"prompt": "a photo of an astronaut", "num_inference_steps": 2, "output_type": "latent"}
SHAPES = ["sd15", "sd21", "sdxl"]


@pytest.fixture
def pair(checkpoints):
    """Both libraries' pipelines over the same files, each with weights of its own."""

    def get(shape):
        import diffusers

        import sfumato
        from support.checkpoints import EVERY

        name = EVERY[shape].pipeline
        both = [getattr(library, name).from_pretrained(checkpoints(shape)) for library in (sfumato, diffusers)]
        for pipe in both:
            pipe.set_progress_bar_config(disable=True)
        return both

    return get


def state_of(pipe, seed=0, **options):
    first = "lora_te1_" if pipe.text_encoder_2 is not None else "lora_te_"
    return {key.replace("lora_te_", first): one for key, one in kohya(random_lora(pipe.parts.adaptable, seed=seed, **options)).items()}  # fmt: skip


def load(both, state, name, **options):
    for pipe in both:
        pipe.load_lora_weights({key: one.clone() for key, one in state.items()}, adapter_name=name, **options)


def check(both, **call):
    mine, other = (pipe(generator=generator(), **CALL, **call).images for pipe in both)
    assert distance(mine, other) < FLOAT32
    return mine


@pytest.mark.parametrize("shape", SHAPES)
def test_kohyas_files_alone_together_and_fused(shape, pair):
    both = mine, other = pair(shape)
    plain = check(both)
    load(both, state_of(mine), "a")
    first = check(both)
    assert distance(first, plain) > 10 * FLOAT32
    assert distance(check(both, cross_attention_kwargs={"scale": 0.5}), first) > FLOAT32
    load(both, state_of(mine, seed=9), "b")
    assert mine.get_active_adapters() == other.get_active_adapters() == ["b"]
    for pipe in both:
        pipe.set_adapters(["a", "b"], [0.7, -1.3])
    check(both)
    blocks = {"unet": {"down": 0.9, "mid": 0.5, "up": 0.3}, "text_encoder": 0.2}
    for pipe in both:
        pipe.set_adapters("a", [blocks])
    check(both)
    for pipe in both:
        pipe.disable_lora()
    assert torch.equal(check(both), plain)
    for pipe in both:
        pipe.enable_lora()
        pipe.set_adapters(["a", "b"])
        pipe.fuse_lora(lora_scale=0.5)
    fused = check(both)
    for pipe in both:
        pipe.unload_lora_weights()
    assert torch.equal(check(both), fused)
    mine.unfuse_lora()
    assert torch.equal(mine(generator=generator(), **CALL).images, plain)


@pytest.mark.parametrize("dora", [False, True])
def test_pefts_own_files_with_their_settings(dora, pair, tmp_path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    mine, other = pair("sd15")
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_k", "to_v", "to_out.0"], rank_pattern={"to_q": 2}, alpha_pattern={"to_q": 3}, use_dora=dora, init_lora_weights=False)  # fmt: skip
    other.unet.add_adapter(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in other.unet.named_parameters():
            if "lora_" in name:
                weight += 0.1 * torch.randn(weight.shape).abs()
    trained = other(generator=generator(), **CALL).images
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata

    layers = get_peft_model_state_dict(other.unet)
    told = _collate_lora_metadata({"unet": other.unet})
    StableDiffusionPipeline.save_lora_weights(tmp_path / "theirs", layers, **told)
    type(mine).save_lora_weights(tmp_path / "ours", layers, unet_lora_adapter_metadata={"r": 4, "lora_alpha": 6, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 3}})  # fmt: skip
    for folder in ("theirs", "ours"):
        mine.load_lora_weights(tmp_path / folder, adapter_name=folder)
        assert distance(mine(generator=generator(), **CALL).images, trained) < FLOAT32


def test_what_is_fused_is_saved_and_nothing_else(pair, tmp_path):
    import sfumato

    mine, _ = pair("sd15")
    plain = mine(generator=generator(), **CALL).images
    mine.load_lora_weights(state_of(mine), adapter_name="a")
    worn = mine(generator=generator(), **CALL).images
    mine.save_pretrained(tmp_path / "plain")
    mine.fuse_lora()
    mine.save_pretrained(tmp_path / "fused")
    for folder, wanted in (("plain", plain), ("fused", worn)):
        again = sfumato.StableDiffusionPipeline.from_pretrained(tmp_path / folder)
        again.set_progress_bar_config(disable=True)
        assert torch.equal(again(generator=generator(), **CALL).images, wanted)


@pytest.mark.parametrize("vectors", [1, 3])
def test_new_words(vectors, pair):
    both = mine, _ = pair("sd15")
    embedding = torch.randn(vectors, mine.text_encoder.config.hidden_size, generator=generator(4))
    for pipe in both:
        pipe.load_textual_inversion(embedding, token="<toy>")
    call = CALL | {"prompt": "a <toy> on the red heart, <toy>"}
    found, wanted = (pipe(generator=generator(), **call).images for pipe in both)
    assert distance(found, wanted) < FLOAT32


def test_new_words_of_two_text_encoders(pair):
    both = mine, other = pair("sdxl")
    pairs = {"clip_l": torch.randn(2, 24, generator=generator(1)), "clip_g": torch.randn(2, 40, generator=generator(2))}
    other.load_textual_inversion(
        pairs["clip_l"], token="<toy>", text_encoder=other.text_encoder, tokenizer=other.tokenizer
    )
    other.load_textual_inversion(
        pairs["clip_g"], token="<toy>", text_encoder=other.text_encoder_2, tokenizer=other.tokenizer_2
    )
    mine.load_textual_inversion(pairs, token="<toy>")
    call = CALL | {"prompt": "a <toy> on the red heart"}
    found, wanted = (pipe(generator=generator(), **call).images for pipe in both)
    assert distance(found, wanted) < FLOAT32
    mine.unload_textual_inversion()
    mine.load_textual_inversion(pairs["clip_l"], token="<toy>", text_encoder=mine.text_encoder)
    mine.load_textual_inversion(pairs["clip_g"], token="<toy>", text_encoder=mine.text_encoder_2)
    assert torch.equal(mine(generator=generator(), **call).images, found)
