"""Arguments of the wrong type, as notebooks pass them: one sentence that names the argument, before torch is asked."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

import sfumato
from sfumato.errors import UsageError
from sfumato.runtime.device import check_dtype

TENSOR, ARRAY = torch.ones(2), np.ones(2)
ODD = {"a tensor": TENSOR, "an array": ARRAY, "a list": [1, 2], "an object": object(), "bytes": b"x"}
INDEX = 0
ROWS = torch.randn(1, 4, 8, 8)


@pytest.fixture
def pipe(ours):
    return ours()


def stepped(scheduler, **changed):
    scheduler.set_timesteps(3)
    return scheduler.step(**{"model_output": ROWS, "timestep": scheduler.timesteps[0], "sample": ROWS} | changed)


# What is called with the odd value, and how the sentence names it.
LOADING = {
    "torch_dtype": ("dtype must be a precision", lambda cls, folder, odd: cls.from_pretrained(folder, torch_dtype=odd)),
    "dtype": ("dtype must be a precision", lambda cls, folder, odd: cls.from_pretrained(folder, dtype=odd)),
    "variant": ("variant must be text", lambda cls, folder, odd: cls.from_pretrained(folder, variant=odd)),
    "name": ("is not a path", lambda cls, folder, odd: cls.from_pretrained(odd)),
    "file": ("is not a path", lambda cls, folder, odd: cls.from_single_file(odd)),
}
PARTS = {
    "subfolder": ("subfolder must be text", lambda cls, folder, odd: cls.from_pretrained(folder, subfolder=odd)),
    "config": ("is not a path", lambda cls, folder, odd: cls.load_config(odd)),
}
PIPELINE = {
    "max_shard_size": lambda pipe, folder, odd: pipe.save_pretrained(folder, max_shard_size=odd),
    "variant": lambda pipe, folder, odd: pipe.save_pretrained(folder, variant=odd),
    "safe_serialization": lambda pipe, folder, odd: pipe.save_pretrained(folder, safe_serialization=odd),
    "from_pipe": lambda pipe, folder, odd: sfumato.StableDiffusionImg2ImgPipeline.from_pipe(odd),
    "device": lambda pipe, folder, odd: pipe.encode_prompt("a cat", odd),
    "do_classifier_free_guidance": lambda pipe, folder, odd: pipe.encode_prompt("a cat", "cpu", 1, odd),
    "adapter_names": lambda pipe, folder, odd: pipe.set_adapters(odd),
    "generator": lambda pipe, folder, odd: pipe("a cat", generator=[odd]),
    "output_type": lambda pipe, folder, odd: pipe("a cat", output_type=odd),
    "return_dict": lambda pipe, folder, odd: pipe("a cat", return_dict=odd),
    "cross_attention_kwargs": lambda pipe, folder, odd: pipe("a cat", cross_attention_kwargs=odd),
    "callback_on_step_end": lambda pipe, folder, odd: pipe("a cat", callback_on_step_end=odd),
    "height": lambda pipe, folder, odd: pipe("a cat", height=odd),
    "unet": lambda pipe, folder, odd: sfumato.StableDiffusionPipeline.from_pretrained(folder, unet=odd),
    "text_encoder": lambda pipe, folder, odd: sfumato.StableDiffusionPipeline.from_pretrained(folder, text_encoder=odd),
}
TOKENIZER = {
    "padding": lambda tokenizer, odd: tokenizer("a cat", padding=odd),
    "truncation": lambda tokenizer, odd: tokenizer("a cat", truncation=odd),
    "max_length": lambda tokenizer, odd: tokenizer("a cat", max_length=odd),
    "return_tensors": lambda tokenizer, odd: tokenizer("a cat", return_tensors=odd),
    "add_special_tokens": lambda tokenizer, odd: tokenizer("a cat", add_special_tokens=odd),
    "text": lambda tokenizer, odd: tokenizer.tokenize(odd),
    "ids": lambda tokenizer, odd: tokenizer.decode([odd]),
    "tokens": lambda tokenizer, odd: tokenizer.convert_tokens_to_ids(odd),
}
SCHEDULER = {
    "device": lambda scheduler, odd: scheduler.set_timesteps(3, device=odd),
    "steps": lambda scheduler, odd: scheduler.set_timesteps(odd),
    "begin_index": lambda scheduler, odd: scheduler.set_begin_index(odd),
    "model_output": lambda scheduler, odd: stepped(scheduler, model_output=[odd]),
    "timestep": lambda scheduler, odd: stepped(scheduler, timestep=[odd]),
    "subfolder": lambda scheduler, odd: type(scheduler).from_pretrained(".", subfolder=odd),
    "is not a path": lambda scheduler, odd: type(scheduler).from_pretrained(odd),
}


def each(table):
    return pytest.mark.parametrize(("name", "odd"), [(name, odd) for name in table for odd in ODD])


def sentence(call) -> str:
    with pytest.raises(UsageError) as raised:
        call()
    text = str(raised.value)
    assert "\n" not in text
    assert len(text) < 300
    return text


@each(LOADING)
@pytest.mark.parametrize("cls", [sfumato.StableDiffusionPipeline, sfumato.UNet2DConditionModel, sfumato.AutoencoderKL])
def test_loading(cls, name, odd, checkpoints):
    words, call = LOADING[name]
    assert words in sentence(partial(call, cls, checkpoints(), ODD[odd]))


@each(PARTS)
@pytest.mark.parametrize("cls", [sfumato.UNet2DConditionModel, sfumato.CLIPTextModel])
def test_loading_parts(cls, name, odd, checkpoints):
    words, call = PARTS[name]
    assert words in sentence(partial(call, cls, checkpoints(), ODD[odd]))


@each(PIPELINE)
def test_pipelines(name, odd, pipe, checkpoints, tmp_path):
    folder = tmp_path if name in ("max_shard_size", "variant", "safe_serialization") else checkpoints()
    text = sentence(partial(PIPELINE[name], pipe, folder, ODD[odd]))
    assert name.removeprefix("callback_on_step_end").partition("_")[0] in text


@each(TOKENIZER)
def test_tokenizers(name, odd, pipe):
    if name == "ids" and odd == "a list":
        return  # rows of ids, which are flattened
    assert name in sentence(partial(TOKENIZER[name], pipe.tokenizer, ODD[odd]))


@each(SCHEDULER)
@pytest.mark.parametrize(
    "cls", [sfumato.DDIMScheduler, sfumato.EulerDiscreteScheduler, sfumato.UniPCMultistepScheduler]
)
def test_schedulers(cls, name, odd):
    assert name in sentence(partial(SCHEDULER[name], cls(), ODD[odd]))


def test_an_output_in_place_of_its_tensor(pipe):
    """The usual slip of a loop by hand."""
    output = pipe.unet(ROWS, 1, torch.randn(1, 20, 24))
    assert "such as unet(…).sample" in sentence(lambda: stepped(sfumato.DDIMScheduler(), model_output=output))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_precisions(dtype):
    check_dtype(dtype)


def test_what_is_right_stays_right(pipe, checkpoints, tmp_path):
    assert pipe.tokenizer.decode(pipe.tokenizer("a cat", return_tensors="pt").input_ids, True) == "a cat"
    assert pipe.tokenizer.convert_ids_to_tokens(pipe.tokenizer.eos_token_id) == "<|endoftext|>"
    assert pipe.tokenizer.convert_tokens_to_ids(("<|endoftext|>",)) == [pipe.tokenizer.eos_token_id]
    pipe.save_pretrained(tmp_path / "new", max_shard_size=10_000, variant="fp16")
    dtypes = {"default": torch.float32, "unet": torch.bfloat16}
    again = sfumato.StableDiffusionPipeline.from_pretrained(tmp_path / "new", variant="fp16", torch_dtype=dtypes)
    assert (again.unet.dtype, again.vae.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("odd", [INDEX, TENSOR, ARRAY, object()], ids=["an index", "a tensor", "an array", "an object"])
def test_where_to_move_is_never_ignored(pipe, odd):
    if not (odd is INDEX and torch.cuda.is_available()):
        assert "cuda" in sentence(lambda: pipe.to(odd))


@pytest.mark.parametrize("name", ["offload", "engine", "compile"])
@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_wishes(name, odd):
    assert name in sentence(lambda: sfumato.load(**{name: odd}))


def test_a_network_takes_no_arguments_of_attention_processors(pipe):
    states = torch.randn(1, 20, 24)
    assert torch.equal(pipe.unet(ROWS, 1, states, cross_attention_kwargs={}).sample, pipe.unet(ROWS, 1, states).sample)
    assert "pipeline" in sentence(lambda: pipe.unet(ROWS, 1, states, cross_attention_kwargs={"scale": 0.5}))
