"""A device that computes wrongly is found, and the plan goes around it: faults of every class that Metal has had."""

from __future__ import annotations

import dataclasses
import json
import logging
import time

import pytest
import torch
from torch.overrides import TorchFunctionMode

from sfumato.cache import cache_folder
from sfumato.errors import UsageError
from sfumato.request import GenerateRequest
from sfumato.runtime import canaries
from sfumato.runtime.canaries import CANARIES, Shapes, checked, kept_name, run_canaries, shapes_of
from sfumato.runtime.choices import Wishes, published_sizes
from sfumato.runtime.facts import Facts, machine
from sfumato.runtime.faults import ANSWERS, NETWORK, PASSED, told
from sfumato.runtime.plan import plan

SD15 = published_sizes("sd15")
CPU = torch.device("cpu")
SMALL = Shapes(heads=((8, 16, 16), (8, 16, 5)), channels=(32, 64), latent=4, groups=32)
MAC = dataclasses.replace(machine("m3-max-64gb"), libraries={"torch": "2.14.0"})
HEALTHY = {f"{name} {dtype}": PASSED for name in CANARIES for dtype in ("float32", "bfloat16")}
REQUEST = GenerateRequest(prompt="a fox", count=4)


def planned(facts: Facts = MAC, sizes=SD15, request=REQUEST, wishes: Wishes = Wishes(), **failed: str):  # noqa: B008
    """The plan of a machine all of whose canaries have passed but for these: conv_float32="off by 20 %"."""
    verdicts = HEALTHY | {name.replace("_", " "): verdict for name, verdict in failed.items()}
    return plan(dataclasses.replace(facts, canaries=verdicts), sizes, request, wishes)


class Fault(TorchFunctionMode):
    """A device some of whose operations are faulty; float64 is the exact one's."""

    def __init__(self, names, change, only=lambda *inputs, **named: True):
        super().__init__()
        self.names, self.change, self.only = names.split(), change, only

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in self.names and out.dtype != torch.float64 and self.only(*args, **(kwargs or {})):
            return self.change(out, *args)
        return out


def first_item_only(out, *_):
    return torch.cat([out[:1], torch.zeros_like(out[1:])])


def scrambled(out, *_):
    return out.roll(1, -1)


def leaking(out, q, k, v, *_):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


PRODUCTS = "matmul __matmul__"
ATTENTION = "scaled_dot_product_attention"
# The classes of reference faults: what is faulty, how, and the canaries that notice.
FAULTS = {
    "long reductions (pytorch#195163)": (PRODUCTS, lambda x, *_: 0.7 * x, lambda a, b: a.shape[-1] >= 32767, {"reduction"}),
    "off by 10 % (pytorch#193487)": ("linear", lambda x, *_: 1.1 * x, lambda *_: True, {"linear", "row"}),
    "one row (InvokeAI#9005)": ("linear", lambda x, *_: 1.3 * x, lambda x, *_: x.shape[0] == 1, {"row"}),
    "first of a batch (pytorch#169342)": ("conv2d", first_item_only, lambda x, *_, **__: x.shape[0] > 1, {"batch", "layout"}),
    "weight layout (pytorch#192212)": ("conv2d", scrambled, lambda x, w, **__: w.shape[2] > 1 and not w.is_contiguous(), {"layout"}),
    "NaN from empty memory (pytorch#187521)": (ATTENTION, lambda x, *_: x * torch.nan, lambda q, *_, **__: q.ndim == 3, {"chunks"}),
    "few permuted queries (pytorch#181133)": (ATTENTION, scrambled, lambda q, *_, **__: q.shape[-2] <= 8 and not q.is_contiguous(), {"fused"}),
    "scrambled heads (pytorch#191794)": (ATTENTION, scrambled, lambda q, *_, attn_mask=None, **__: q.ndim == 4 and attn_mask is None, {"fused"}),
    "seeing the future (pytorch#195910)": (ATTENTION, leaking, lambda *_, attn_mask=None, **__: attn_mask is not None, {"mask"}),
    "imprecise softmax (pytorch#181742)": ("softmax exp", lambda x, *_: x + 0.2, lambda *_: True, {"split"}),
    "black images (ComfyUI#10681)": ("group_norm", lambda x, *_: 0 * x, lambda *_, **__: True, {"norm"}),
    "garbage (pytorch#187280)": ("conv2d linear", lambda x, *_: torch.randn_like(x), lambda *_, **__: True, {"conv", "batch", "layout", "linear", "row"}),
    "a gate": ("gelu", lambda x, *_: -x, lambda *_, **__: True, {"geglu"}),
    "enlarging": ("interpolate", scrambled, lambda *_, **__: True, {"upsample"}),
    "sums": ("mul __mul__ __rmul__", lambda x, *_: x + 1, lambda *_: True, {"sum", "geglu", "split", "norm"}),
}  # fmt: skip


def failed(**options) -> set[str]:
    verdicts = run_canaries(CPU, SMALL, ("float32",), **options)
    assert {key.split()[0] for key in verdicts} == CANARIES.keys()
    return {key.split()[0] for key, verdict in verdicts.items() if verdict != PASSED}


def test_a_healthy_device_passes_in_every_precision():
    verdicts = run_canaries(CPU, SMALL, ("float32", "bfloat16", "float16"))
    assert set(verdicts.values()) == {PASSED}
    assert set(CANARIES) == NETWORK.keys() | ANSWERS.keys()


@pytest.mark.parametrize("fault", FAULTS)
def test_each_class_of_fault_is_noticed(fault):
    names, change, only, expected = FAULTS[fault]
    found = failed(around=lambda: Fault(names, change, only))
    assert found
    assert found == expected or fault == "sums"


def test_a_fault_of_used_memory_is_noticed_the_second_time():
    calls = []

    def later(out, *_):
        calls.append(1)
        return out if len(calls) % 2 else 1.2 * out

    assert "linear" in failed(around=lambda: Fault("linear", later))


def test_what_raises_or_hangs_has_failed_and_memory_that_runs_out_has_not():
    def refuse(*_):
        raise RuntimeError("not implemented for this device")

    def hang(*_):
        time.sleep(5)

    def full(*_):
        raise torch.OutOfMemoryError("out of memory")

    verdicts = run_canaries(CPU, SMALL, ("float32",), around=lambda: Fault("group_norm", refuse))
    assert verdicts["norm float32"] == "RuntimeError: not implemented for this device"
    began = time.perf_counter()
    verdicts = run_canaries(CPU, SMALL, ("float32",), limit=0.3, around=lambda: Fault("linear group_norm", hang))
    assert time.perf_counter() - began < 5
    assert verdicts["linear float32"].startswith("took more than 0.3 s")
    assert verdicts["norm float32"].startswith("not tried after 2")
    verdicts = run_canaries(CPU, SMALL, ("float32",), around=lambda: Fault("group_norm", full))
    assert "norm float32" not in verdicts


def test_shapes_are_the_models():
    found = shapes_of(SD15)
    assert {width for width, _, _ in found.heads} == {40, 80, 160, 512}
    assert (40, 4096, 4096) in found.heads
    assert (40, 4096, 77) in found.heads
    assert found.channels == (320, 1280)


@pytest.mark.parametrize(
    ("name", "dtype", "changes"),
    [
        ("fused", "bfloat16", {"attention": "chunked"}),
        ("mask", "bfloat16", {"attention": "chunked"}),  # whose softmax is float32's
        ("reduction", "float32", {}),  # Metal's keys are always split
        ("batch", "bfloat16", {"micro_batch": 1, "singly": True}),
        ("layout", "bfloat16", {}),  # Metal's weights are always contiguous
        *((name, "bfloat16", {"unet_dtype": "float32", "vae_dtype": "float32"}) for name in NETWORK if name != "sum"),
        *((name, "float32", {"device": "cpu"}) for name in NETWORK),
    ],
)
def test_each_canary_that_fails_changes_the_plan_and_is_named(name, dtype, changes):
    before = planned()
    assert (before.device, before.unet_dtype, before.attention, before.micro_batch) == ("mps", "bfloat16", "fused", 2)
    assert before.faults == ()
    found = planned(**{f"{name}_{dtype}": "off by 20 %"})
    assert {key: getattr(found, key) for key in changes} == changes
    assert all(getattr(before, key) != value for key, value in changes.items())
    assert len(found.faults) == 1
    for word in (f"canary '{name}'", dtype, "off by 20 %", "Apple M3 Max"):
        assert word in found.faults[0]
    assert found.faults[0] in found.reasons


def test_canaries_on_other_devices_change_the_plan():
    card, laptop = machine("h200"), machine("laptop-8gb")
    assert planned(card, fused_float16="NaN or infinity").attention == "chunked"
    assert planned(card, fused_float16="x", chunks_float16="x").attention == "split"
    assert planned(card, layout_float16="x").memory_format == "contiguous"
    assert planned(card, reduction_float16="x").attention_keys == 2**14
    assert planned(card, conv_float16="x").unet_dtype == "float32"
    assert planned(card, batch_float16="x").micro_batch == 1
    assert planned(laptop, chunks_float32="x").attention == "split"
    assert "do not trust its images" in planned(laptop, conv_float32="x").faults[0]
    two = planned(fused_bfloat16="x", chunks_float32="x")
    assert (two.attention, two.attention_keys) == ("split", 2**14)


def test_the_users_choice_of_a_device_or_precision_stands_and_the_fault_is_named():
    found = planned(wishes=Wishes(device="mps"), conv_float32="off by 20 %")
    assert found.device == "mps"
    assert "unless you choose a device" in found.faults[0]
    assert planned(wishes=Wishes(dtype="bf16"), conv_bfloat16="x").unet_dtype == "bfloat16"
    assert planned(wishes=Wishes(device="cpu"), conv_float32="x").faults == ()


def test_without_canaries_metal_stays_careful():
    found = plan(MAC, SD15, REQUEST)
    assert (found.unet_dtype, found.attention, found.micro_batch) == ("float32", "chunked", 1)
    unproved = plan(dataclasses.replace(MAC, canaries={"fused float32": PASSED}), SD15, REQUEST, Wishes(dtype="fp16"))
    assert unproved.attention == "chunked"


def test_verdicts_are_kept_for_this_machine_alone(monkeypatch, caplog):
    runs = []

    def run(device, shapes, dtypes):
        runs.append(str(device))
        return HEALTHY

    monkeypatch.setattr(canaries, "run_canaries", run)
    facts = dataclasses.replace(MAC, system_build="25C56")
    assert checked(facts, SD15).canaries == HEALTHY
    assert checked(facts, SD15).canaries == HEALTHY
    assert runs == ["mps"]
    for other in (
        {"system_build": "25C57"},
        {"libraries": {"torch": "2.15.0"}},
        {"accelerator_name": "Apple M5"},
    ):
        checked(dataclasses.replace(facts, **other), SD15)
    checked(facts, published_sizes("sdxl"))
    assert len(runs) == 5
    path = cache_folder() / kept_name(facts, shapes_of(SD15))
    kept = json.loads(path.read_text())
    for damage in (
        "{",
        "{}",
        json.dumps(kept | {"of": "another machine"}),
        json.dumps(kept | {"verdicts": {"conv": 1}}),
    ):
        path.write_text(damage)
        runs.clear()
        with caplog.at_level(logging.WARNING, "sfumato"):
            assert checked(facts, SD15).canaries == HEALTHY
        assert runs == ["mps"]
        assert str(path) in caplog.text
        caplog.clear()
    runs.clear()
    checked(facts, SD15, again=True)
    assert runs == ["mps"]


def test_what_hung_is_tried_again_next_time(monkeypatch):
    verdicts = HEALTHY | {"conv float32": "took more than 30 s"}
    monkeypatch.setattr(canaries, "run_canaries", lambda *_: verdicts)
    facts = dataclasses.replace(MAC, system_build="hung")
    assert checked(facts, SD15).canaries == verdicts
    assert not (cache_folder() / kept_name(facts, shapes_of(SD15))).exists()


def test_a_cpu_runs_none_unless_it_is_asked_to(monkeypatch):
    runs = []
    monkeypatch.setattr(canaries, "run_canaries", lambda *_: runs.append(1) or HEALTHY)
    laptop = dataclasses.replace(machine("laptop-8gb"), system_version="canaries")
    assert checked(laptop, SD15).canaries == {}
    assert runs == []
    assert checked(laptop, SD15, run=True).canaries == HEALTHY
    assert checked(laptop, SD15).canaries == HEALTHY  # what doctor has kept
    assert runs == [1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"system_version": "27.0", "libraries": {"torch": "2.12.1"}}, ["macOS 27", "torch>=2.13", "pytorch#187280"]),
        ({"architecture": "x86_64", "accelerator_name": "AMD Radeon Pro 5500M"}, ["Intel Macs", "--device cpu"]),
    ],
)
def test_macs_that_draw_garbage_are_refused(changes, words):
    facts = dataclasses.replace(MAC, **changes)
    with pytest.raises(UsageError, match="device 'mps' is not used") as refused:
        plan(facts, SD15, REQUEST, Wishes(device="mps"))
    found = plan(facts, SD15, REQUEST)
    assert found.device == "cpu"
    for word in words:
        assert word in str(refused.value)
        assert word in " ".join(found.faults)
        assert word in " ".join(found.reasons)
        assert word in " ".join(told(facts))
    assert plan(dataclasses.replace(MAC, system_version="27.0"), SD15, REQUEST).device == "mps"
    assert checked(facts, SD15).canaries == {}  # which no such GPU runs


def test_facts_with_verdicts_go_through_json(tmp_path):
    facts = dataclasses.replace(MAC, system_build="25C56", canaries=HEALTHY | {"conv float32": "off by 20 %"})
    path = tmp_path / "mac.json"
    facts.to_json(path)
    assert Facts.from_json(path) == facts
    assert plan(Facts.from_json(path), SD15, REQUEST).device == "cpu"
