"""Carrying out a plan: the same pictures however memory and kernels turn out."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sfumato
from sfumato import AdapterFile, GenerateRequest
from sfumato.errors import MemoryPlanError
from sfumato.kernels import CompilerError, kernels_for
from sfumato.models.packed import is_packed, packable
from sfumato.pipelines import place as place_module
from sfumato.pipelines import run as run_module
from sfumato.pipelines.place import to_accelerator
from sfumato.runtime.facts import machine, read_facts
from support.adapters import kohya, random_lora

PARTS = ("text_encoder", "unet", "vae")


def request(**changes) -> GenerateRequest:
    return GenerateRequest(**{"prompt": "a photo", "steps": 2, "seed": 3} | changes)


def pixels(result) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.int16) for image in result.images])


@pytest.fixture
def folder(checkpoints):
    return checkpoints()


def load(folder, **options):
    return sfumato.load(folder, device="cpu", **{"dtype": torch.float32} | options)


@pytest.fixture
def expected(folder):
    """The picture as torch's own layers draw it."""
    return pixels(load(folder, engine="torch").generate(request()))


def test_the_packed_engine_draws_what_torch_draws(folder, expected):
    pipe = load(folder)
    result = pipe.generate(request())
    assert np.abs(pixels(result) - expected).max() <= 1
    assert result.plan.engine == ("onednn" if "avx2" in read_facts("cpu").instructions else "torch")
    assert is_packed(pipe.unet) == (result.plan.engine == "onednn" and packable(torch.float32))
    assert result.plan.reasons
    assert result.notes == ()


def test_without_a_compiler_it_is_slower_and_says_so_once(folder, expected, monkeypatch, caplog):
    def missing(dtype):
        raise CompilerError("there is no C compiler")

    monkeypatch.setattr(place_module, "kernels_for", missing)
    pipe = load(folder, engine="onednn")
    with caplog.at_level(logging.WARNING, logger="sfumato"):
        results = [pipe.generate(request()) for _ in range(2)]
    for result in results:
        assert np.abs(pixels(result) - expected).max() <= 1
        assert any("there is no C compiler" in note for note in result.notes)
    assert sum("there is no C compiler" in record.message for record in caplog.records) == 1


def test_networks_that_take_turns_draw_the_same(folder, expected):
    pipe = load(folder, offload="staged")
    assert {getattr(pipe, part).device.type for part in PARTS} == {"meta"}
    for _ in range(2):
        result = pipe.generate(request())
        assert np.abs(pixels(result) - expected).max() <= 1
        assert {getattr(pipe, part).device.type for part in PARTS} == {"meta"}
        assert pipe.device.type == "cpu"
    assert result.plan.offload == "staged"
    kept = load(folder).generate(request())
    assert result.recipes[0]["model"]["weights"] == kept.recipes[0]["model"]["weights"]


def test_another_pipeline_over_parts_that_take_turns(folder, expected):
    pipe = load(folder, offload="staged")
    other = sfumato.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert other.device.type == "cpu"
    assert np.abs(pixels(other.generate(request())) - expected).max() <= 1


def told(result, *choices: str) -> set[str]:
    """Of the choices named, those that the plan's reasons say were asked for."""
    return {
        choice for choice in choices for reason in result.plan.reasons if choice in reason and "as requested" in reason
    }


def test_reasons_say_as_requested_only_of_what_was_asked(folder):
    choices = ("device", "U-Net in", "one network in memory", "engine", "torch.compile", "batch size", "steps")
    few = request(steps=2)
    assert told(sfumato.load(folder).generate(request(steps=41)), *choices) == set()
    assert told(sfumato.load(folder, once=True).generate(few), *choices) == set()
    assert told(sfumato.load(folder, device="auto").generate(few), *choices) == set()
    assert told(sfumato.load(folder, device="cpu", dtype=torch.float32).generate(few), *choices) == {
        "device",
        "U-Net in",
    }
    options = {"offload": "staged", "compile": False, "micro_batch": 1, "engine": "torch"}
    asked = sfumato.load(folder, **options).generate(few)
    assert told(asked, *choices) == {"one network in memory", "engine", "torch.compile", "batch size"}


def test_reasons_of_a_pipeline_that_no_plan_loaded_say_so(folder):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        pipe = sfumato.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
        result = pipe.generate(request())
        assert told(result, "device", "U-Net in", "one network in memory") == set()
        assert result.plan.unet_dtype == str(dtype).removeprefix("torch.")
        assert result.plan.reasons[0].startswith("device cpu")
        assert "where the pipeline is" in result.plan.reasons[0]
    assert "U-Net in float16: as it was loaded" in result.plan.reasons
    moved = sfumato.load(folder, dtype=torch.bfloat16).to(torch.float32)
    assert told(moved.generate(request()), "U-Net in") == set()


def test_a_damaged_file_is_found_before_anything_is_drawn(folder, tmp_path):
    import shutil

    from sfumato.errors import CheckpointError

    shutil.copytree(folder, tmp_path / "copy")
    (weights,) = (tmp_path / "copy" / "vae").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"vae.*truncated"):
        load(tmp_path / "copy", offload="staged")


def test_weights_that_a_user_changed_never_leave_memory(folder):
    pipe = sfumato.StableDiffusionPipeline.from_pretrained(folder)
    pipe.place.wishes = dataclasses.replace(pipe.place.wishes, offload="staged")
    with torch.no_grad():
        pipe.unet.conv_out.bias += 0.25
    before = pipe.unet.conv_out.bias.clone()
    pipe.generate(request())
    assert torch.equal(pipe.unet.conv_out.bias, before)


def test_to_an_accelerator_and_back_without_a_copy(folder):
    unet = load(folder).unet
    before = {name: (value.data_ptr(), value.clone()) for name, value in unet.named_parameters()}
    hosts = to_accelerator(unet, torch.device("cpu"))
    assert hosts.keys() == {*unet.parameters(), *unet.buffers()}
    for tensor in hosts:
        tensor.data = torch.zeros_like(tensor)  # as it would be elsewhere
    for tensor, host in hosts.items():
        tensor.data = host
    for name, value in unet.named_parameters():
        assert value.data_ptr() == before[name][0]
        assert torch.equal(value, before[name][1])


def test_images_computed_together_are_decoded_one_at_a_time_as_planned(folder, monkeypatch):
    monkeypatch.setattr("sfumato.runtime.plan.TOGETHER", 0)  # or they would be small enough to be decoded together
    pipeline, decoded = load(folder, micro_batch=2), []
    real = pipeline.vae.decoder.forward
    monkeypatch.setattr(pipeline.vae.decoder, "forward", lambda z: (decoded.append(z.shape[0]), real(z))[1])
    result = pipeline.generate(request(count=2))
    assert (result.plan.micro_batch, result.plan.vae_slicing, decoded) == (2, True, [1, 1])
    assert not pipeline.vae.use_slicing
    alone = [load(folder).generate(request(seed=seed)) for seed in (3, 4)]
    assert np.abs(pixels(result) - np.concatenate([pixels(one) for one in alone])).max() <= 1


def running_out(monkeypatch, times: int):
    """The decoder runs out of memory so often."""
    left, real = [times], run_module.stages.decode

    def decode(*arguments):
        left[0] -= 1
        if left[0] >= 0:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return real(*arguments)

    monkeypatch.setattr(run_module.stages, "decode", decode)


def test_memory_that_vanishes_is_asked_for_once_more_with_less(folder, expected, monkeypatch):
    running_out(monkeypatch, 1)
    result = load(folder).generate(request())
    assert np.abs(pixels(result) - expected).max() <= 1  # smaller than a tile
    assert [note for note in result.notes if "memory ran out" in note]


def test_memory_that_stays_away_is_a_clear_failure(folder, monkeypatch):
    running_out(monkeypatch, 9)
    with pytest.raises(MemoryPlanError, match="memory ran out twice"):
        load(folder).generate(request())


def test_another_error_is_not_taken_for_a_want_of_memory(folder, monkeypatch):
    def decode(*arguments):
        raise RuntimeError("something else")

    monkeypatch.setattr(run_module.stages, "decode", decode)
    with pytest.raises(RuntimeError, match="something else"):
        load(folder).generate(request())


def test_what_does_not_fit_is_refused_before_a_weight_is_read(folder, monkeypatch):
    small = dataclasses.replace(machine("laptop-8gb"), memory_free=2**28)
    monkeypatch.setattr("sfumato.pipelines.loading.read_facts", lambda device: small)
    monkeypatch.setattr("sfumato.checkpoints.weights.load_into", lambda *a, **k: pytest.fail("a weight was read"))
    with pytest.raises(MemoryPlanError, match="free on"):
        load(folder, request=request(width=512, height=512))


def test_weights_in_eight_bits_are_said_once_and_named_in_the_recipe(folder, expected, caplog):
    pipe = load(folder, eight_bit=True)
    with caplog.at_level(logging.WARNING, logger="sfumato"):
        first, second = (pipe.generate(request()) for _ in range(2))
    assert sum("8 bits" in record.message for record in caplog.records) == 1
    for result in (first, second):
        assert result.plan.eight_bit
        assert any("U-Net weights in 8 bits, about" in note and "dB" in note for note in result.notes)
        assert result.recipes[0]["model"]["eight_bit"] is True
        assert np.abs(pixels(result) - expected).mean() < 4
        assert (pixels(result) != expected).any()
    assert pixels(first).tobytes() == pixels(second).tobytes()
    exact = load(folder).generate(request())
    assert "eight_bit" not in exact.recipes[0]["model"]
    assert exact.recipes[0]["model"]["weights"] == first.recipes[0]["model"]["weights"]


@pytest.mark.parametrize("offload", ["none", "staged"])
def test_exact_weights_come_back_when_there_is_memory_again(folder, expected, monkeypatch, offload):
    pipe = load(folder, offload=offload)
    fits = pipe.place.plan(pipe.parts, request())
    monkeypatch.setattr(place_module, "plan", lambda *known: dataclasses.replace(fits, eight_bit=small))
    for small in (False, True, False):
        result = pipe.generate(request())
        assert pipe.unet.eight_bit == small
        assert (np.abs(pixels(result) - expected).max() <= 1) != small


def test_adapters_on_weights_in_eight_bits(folder, tmp_path):
    pipe, exact = load(folder, eight_bit=True), load(folder)
    before = pipe.generate(request())
    file = tmp_path / "lora.safetensors"
    modules = random_lora({"unet": exact.unet})
    save_file(kohya(modules), file)
    worn = request(adapters=(AdapterFile(file=str(file)),))
    with_it, wanted = (pixels(one.generate(worn)) for one in (pipe, exact))
    assert np.abs(with_it - wanted).mean() < 4
    assert np.abs(with_it - pixels(before)).mean() > 2 * np.abs(with_it - wanted).mean()
    assert pixels(pipe.generate(request())).tobytes() == pixels(before).tobytes()


def test_the_largest_batch_is_one_call(folder):
    pipe = load(folder)
    assert pipe.largest_batch(request()) >= pipe.largest_batch(request(width=128, height=128)) > 0


def test_float16_on_a_cpu_becomes_what_the_processor_has(folder, caplog):
    with caplog.at_level(logging.WARNING, logger="sfumato"):
        pipe = load(folder, dtype=torch.float16)
    native = read_facts("cpu").native_bfloat16("cpu")
    assert pipe.dtype == (torch.bfloat16 if native else torch.float32)
    assert sum("instead of float16" in record.message for record in caplog.records) == 1


def test_many_pictures_are_those_of_single_runs(folder):
    pipe = load(folder)
    many = pipe.generate(request(count=5))
    assert many.plan.micro_batch == 1
    for index in range(5):
        alone = pipe.generate(request(seed=3 + index))
        assert many.images[index].tobytes() == alone.images[0].tobytes()


def test_kernels_are_loaded_once():
    assert kernels_for(torch.float32) is kernels_for(torch.float32)


def test_a_faulty_device_is_drawn_around_and_named(folder, expected, monkeypatch, caplog):
    """Plain products and single convolutions draw the same, and the recipe says why."""
    from sfumato.pipelines import loading

    verdicts = {"chunks float32": "off by 20 %", "batch float32": "off by 30 %"}

    def faulty(facts, sizes, **_):
        return dataclasses.replace(facts, canaries=verdicts)

    monkeypatch.setattr(loading, "checked", faulty)
    batches = []
    convolve = torch.nn.Conv2d._conv_forward

    def watch(self, x, weight, bias):
        batches.append(x.shape[0])
        return convolve(self, x, weight, bias)

    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", watch)
    pipe = load(folder, engine="torch")
    pipe.place.facts = dataclasses.replace(pipe.place.facts, canaries=verdicts)
    with caplog.at_level(logging.WARNING, logger="sfumato"):
        result = pipe.generate(request())
    assert (result.plan.attention, result.plan.singly) == ("split", True)
    assert set(batches) == {1}
    assert np.abs(pixels(result) - expected).max() <= 1
    assert len(result.plan.faults) == 2
    for sentence in result.plan.faults:
        assert sentence in result.notes
        assert sentence in result.recipes[0]["notes"]
        assert sum(sentence == record.message for record in caplog.records) == 1
    pipe.place.facts = dataclasses.replace(pipe.place.facts, canaries={})
    pipe.place.faults = ()
    batches.clear()
    healthy = pipe.generate(request())
    assert max(batches) == 2
    assert not {*result.plan.faults} & {*healthy.notes}


def test_a_gpu_that_is_not_used_is_named_in_the_recipe(folder, monkeypatch):
    from sfumato.pipelines import loading

    mac = dataclasses.replace(machine("m3-max-64gb"), canaries={"conv float32": "off by 20 %"})
    monkeypatch.setattr(loading, "read_facts", lambda device: mac)
    monkeypatch.setattr(loading, "checked", lambda facts, sizes: facts)
    pipe = sfumato.load(folder)
    assert pipe.device.type == "cpu"
    result = pipe.generate(request())
    (fault,) = result.plan.faults
    assert "the CPU is chosen" in fault
    assert fault in result.recipes[0]["notes"]
    assert fault in result.plan.reasons


def test_the_recipe_names_the_build_of_macos(monkeypatch):
    from sfumato.pipelines import result as module

    monkeypatch.setattr(module, "system_build", lambda: "25C56")
    monkeypatch.setattr(module.platform, "mac_ver", lambda: ("26.2", ("", "", ""), "arm64"))
    assert module.versions()["macos"] == "26.2 (25C56)"
    monkeypatch.setattr(module, "system_build", lambda: None)
    assert "macos" not in module.versions()


def test_nothing_is_computed_in_ways_that_metal_gets_wrong(folder):
    """What Metal's faults would touch if anyone did it (runtime/quirks.py): these ways stay unused."""
    from torch.overrides import TorchFunctionMode

    found, called = set(), set()

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            name, named = getattr(func, "__name__", ""), kwargs or {}
            called.add(name)
            if name == "linear" and args[0].stride(-1) != 1:
                found.add("a transposed view on the left of a product (pytorch#193487)")
            if name == "conv2d" and not args[1].is_contiguous():
                found.add("a convolution with a weight that is not contiguous (pytorch#192212)")
            if name == "scaled_dot_product_attention":
                if named.get("is_causal"):
                    found.add("causal attention without a mask (pytorch#195910)")
                if args[0].shape[-1] != args[2].shape[-1]:
                    found.add("values of another width than queries (pytorch#176767)")
            if "baddbmm" in name:
                found.add("baddbmm, which reads what it is to ignore (pytorch#187521)")
            return func(*args, **named)

    pipe = load(folder, engine="torch")
    for model in (pipe.text_encoder, pipe.unet, pipe.vae):  # in the layout that a plan for Metal gives them
        model.to(memory_format=torch.contiguous_format)
    with Watch(), torch.no_grad():
        states = pipe.text_encoder(torch.zeros(1, 20, dtype=torch.long))[0]
        latents = torch.randn(1, pipe.unet.config.in_channels, 8, 8)
        pipe.unet(latents, 1, states)
        pipe.vae.decode(latents)
    assert {"linear", "conv2d", "scaled_dot_product_attention"} <= called
    assert found == set()
