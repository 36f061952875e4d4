"""What is decided for a machine and a request, before a weight is read."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import CheckpointError, MemoryPlanError, UsageError
from sfumato.families import FAMILIES
from sfumato.pipelines.sizes import read_sizes
from sfumato.request import GenerateRequest
from sfumato.runtime.choices import DTYPE_BYTES, published_sizes, task_of
from sfumato.runtime.chunks import attention_chunk
from sfumato.runtime.facts import machine, machine_names
from sfumato.runtime.footprint import footprint, largest_tensor
from sfumato.runtime.plan import USABLE, Plan, Wishes, fits_beside, largest_batch, plan
from support.checkpoints import SHAPES

SD15 = published_sizes("sd15")
GIB = 2**30
MACS = ["m1-8gb", "m2-16gb", "m3-max-64gb", "m4-16gb", "m5-24gb"]
LIMIT_BYTES, LIMIT_NUMBERS = 2**32, 2**31
machines = st.sampled_from(machine_names())
sides = st.integers(1, 32).map(lambda n: 64 * n)


def request(**values) -> GenerateRequest:
    return GenerateRequest(prompt="a fox", **values)


@pytest.mark.parametrize("name", machine_names())
def test_every_shipped_machine_draws_512(name):
    facts = machine(name)
    found = plan(facts, SD15, request())
    assert found.device == facts.accelerator
    assert 0 < found.peak_bytes <= USABLE * found.free_bytes
    assert 0.1 < found.seconds < 3600
    assert found.steps == 50
    assert (found.threads is None) == (found.kind != "cpu")
    assert not found.vae_tiling
    assert len(found.reasons) >= 5
    assert len(set(found.reasons)) == len(found.reasons)
    assert largest_batch(facts, SD15, request()) >= 1
    assert plan(facts, SD15, request()) == found


@pytest.mark.parametrize(
    ("name", "unet", "vae"),
    [
        ("t4-16gb", "float16", "float32"),
        ("rtx-4090", "float16", "bfloat16"),
        ("h100", "float16", "bfloat16"),
        ("h200", "float16", "bfloat16"),
        ("m1-8gb", "float16", "float32"),
        ("m2-16gb", "float32", "float32"),
        ("m3-max-64gb", "float32", "float32"),
        ("m4-16gb", "float32", "float32"),
        ("m5-24gb", "float32", "float32"),
        ("laptop-8gb", "float32", "float32"),
    ],
)
def test_precisions(name, unet, vae):
    found = plan(machine(name), SD15, request())
    assert (found.text_encoder_dtype, found.unet_dtype, found.vae_dtype) == (unet, unet, vae)


@pytest.mark.parametrize("instruction", ["avx512_bf16", "amx_bf16", "neon_bf16"])
def test_bfloat16_where_the_processor_has_it(instruction):
    facts = dataclasses.replace(machine("laptop-8gb"), instructions=("avx2", instruction))
    found = plan(facts, SD15, request())
    assert found.unet_dtype == found.vae_dtype == "bfloat16"
    assert any(instruction in reason for reason in found.reasons)


def test_float16_never_runs_on_a_cpu():
    facts = machine("laptop-8gb")
    for name in ("float16", "fp16"):
        found = plan(facts, SD15, request(), Wishes(dtype=name))
        assert found.unet_dtype == "float32"
        assert any("float32 instead of float16" in reason for reason in found.reasons)
    native = dataclasses.replace(facts, instructions=("avx2", "avx512_bf16"))
    assert plan(native, SD15, request(), Wishes(unet_dtype="float16")).unet_dtype == "bfloat16"
    assert plan(machine("h200"), SD15, request(), Wishes(device="cpu", dtype="fp16")).unet_dtype == "bfloat16"


def test_an_emulated_precision_is_obeyed_and_said():
    for name in ("laptop-8gb", "t4-16gb"):
        found = plan(machine(name), SD15, request(), Wishes(dtype="bf16"))
        assert found.unet_dtype == "bfloat16"
        assert any("bfloat16 is emulated" in reason for reason in found.reasons)
    assert not any(
        "emulated" in reason for reason in plan(machine("h200"), SD15, request(), Wishes(dtype="bf16")).reasons
    )


def test_engines_and_layouts():
    cpu, mac, gpu = (plan(machine(name), SD15, request()) for name in ("laptop-8gb", "m2-16gb", "h200"))
    assert (cpu.engine, cpu.memory_format, cpu.attention) == ("onednn", "channels_last", "chunked")
    assert (mac.engine, mac.memory_format, mac.attention) == ("torch", "contiguous", "chunked")
    assert (gpu.engine, gpu.memory_format, gpu.attention) == ("torch", "channels_last", "fused")
    old = dataclasses.replace(machine("laptop-8gb"), instructions=())
    assert plan(old, SD15, request()).engine == "torch"
    with pytest.raises(UsageError, match="AVX2"):
        plan(old, SD15, request(), Wishes(engine="onednn"))
    with pytest.raises(UsageError, match="there is no engine 'openvino'"):
        Wishes(engine="openvino")


def test_threads_leave_busy_cores_alone():
    busy = dataclasses.replace(machine("laptop-8gb"), load=2.4)
    found = plan(busy, SD15, request())
    assert found.threads == 2
    assert any("keep 2.4 of" in reason for reason in found.reasons)
    assert plan(busy, SD15, request(), Wishes(threads=4)).threads == 4


def test_time_of_a_command_includes_its_start():
    laptop = machine("laptop-8gb")
    computing, command = (plan(laptop, SD15, request(), Wishes(once=once, offload="staged")) for once in (False, True))
    assert 3 < command.seconds - computing.seconds < 20  # Python, torch, and four gigabytes of weights
    crowded = plan(dataclasses.replace(laptop, load=2 * laptop.cores), SD15, request(steps=1), Wishes(once=True))
    assert crowded.seconds > plan(laptop, SD15, request(steps=1), Wishes(once=True)).seconds


def test_batches_are_cut_where_that_is_right():
    assert plan(machine("laptop-8gb"), SD15, request(count=64)).micro_batch == 1
    assert plan(machine("m3-max-64gb"), SD15, request(count=8)).micro_batch == 1
    found = plan(machine("h200"), SD15, request(count=64))
    assert found.micro_batch == 16
    assert found.vae_slicing
    assert not plan(machine("h200"), SD15, request(count=16, width=64, height=64)).vae_slicing  # all at once are small
    assert plan(machine("h200"), SD15, request(count=3)).micro_batch == 3
    small = dataclasses.replace(machine("t4-16gb"), accelerator_memory_free=5 * GIB)
    assert 1 <= plan(small, SD15, request(count=64, width=1024, height=1024)).micro_batch < 16


def test_many_pictures_take_the_memory_of_a_micro_batch():
    for name in ("laptop-8gb", "h200"):
        few, many = (plan(machine(name), SD15, request(count=count)) for count in (16, 64))
        pictures = 48 * 3 * 512 * 512
        assert many.peak_bytes - few.peak_bytes == pytest.approx(pictures, rel=0.1)


def test_compiling_has_to_be_repaid():
    gpu = machine("h200")
    assert not plan(gpu, SD15, request(count=8)).compile
    long = plan(gpu, SD15, request(count=1000))
    assert long.compile
    assert long.seconds < plan(gpu, SD15, request(count=1000), Wishes(compile=False)).seconds
    assert not plan(machine("laptop-8gb"), SD15, request(count=64)).compile  # packed weights are not compiled
    slow = dataclasses.replace(machine("laptop-8gb"), instructions=(), compiler="/usr/bin/cc")
    assert plan(slow, SD15, request(count=8)).compile
    assert not plan(dataclasses.replace(slow, compiler=None), SD15, request(count=8)).compile
    assert plan(gpu, SD15, request(), Wishes(compile=True)).compile


def test_what_is_compiled_is_not_packed():
    facts = machine("laptop-8gb")
    assert plan(facts, SD15, request()).engine == "onednn"
    asked = plan(facts, SD15, request(), Wishes(compile=True))
    assert (asked.engine, asked.compile) == ("torch", True)
    assert any("cannot compile the faster onednn engine" in reason for reason in asked.reasons)
    with pytest.raises(UsageError, match="one of the two"):
        plan(facts, SD15, request(), Wishes(compile=True, engine="onednn"))


WISHES = [
    {"device": "cpu"},
    {"dtype": "float32"},
    {"unet_dtype": "bfloat16"},
    {"text_encoder_dtype": "float32"},
    {"vae_dtype": "float32"},
    {"attention": "chunked"},
    {"attention_bytes": 2**22, "attention": "chunked"},
    {"micro_batch": 2},
    {"vae_slicing": True},
    {"vae_slicing": False},
    {"vae_tiling": True},
    {"offload": "staged"},
    {"offload": "none"},
    {"compile": True},
    {"compile": False},
    {"engine": "torch"},
]


@pytest.mark.parametrize("name", ["h200", "m3-max-64gb", "laptop-16gb"])
@pytest.mark.parametrize("wish", WISHES, ids=lambda wish: "-".join(f"{key}={value}" for key, value in wish.items()))
def test_wishes_win(name, wish):
    if name == "laptop-16gb":
        facts = dataclasses.replace(machine("laptop-8gb"), memory_total=16 * GIB, memory_free=14 * GIB)
    else:
        facts = machine(name)
    found = plan(facts, SD15, request(count=4), Wishes(**wish))
    for key, value in wish.items():
        if key == "dtype":
            assert {found.text_encoder_dtype, found.unet_dtype, found.vae_dtype} == {value}
        else:
            assert getattr(found, key) == value


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"dtype": "float61"}, "did you mean 'float16'"),
        ({"engine": "rocket"}, "onednn"),
        ({"attention": "none"}, "fused, chunked"),
        ({"offload": "disk"}, "staged"),
        ({"micro_batch": 0}, "micro_batch must be a whole number"),
        ({"threads": True}, "threads must be"),
        ({"attention_bytes": 1.5}, "attention_bytes"),
    ],
)
def test_wishes_that_mean_nothing(wish, words):
    with pytest.raises(UsageError, match=words):
        Wishes(**wish)


def test_a_device_that_is_not_there():
    with pytest.raises(UsageError, match="'cuda' is not available on Apple M1, 8 GB; available: cpu and mps"):
        plan(machine("m1-8gb"), SD15, request(), Wishes(device="cuda"))
    assert plan(machine("h200"), SD15, request(), Wishes(device="cuda:1")).device == "cuda:1"


@pytest.mark.parametrize("size", [{"width": 500}, {"height": 7}])
def test_sizes_that_no_vae_makes(size):
    (name, value), *_ = size.items()
    with pytest.raises(UsageError, match=f"{name} must be divisible by 8, and {value} is not"):
        plan(machine("h200"), SD15, request(**size))


def test_a_refusal_says_what_would_fit():
    facts = machine("laptop-8gb")
    with pytest.raises(MemoryPlanError) as caught:
        plan(facts, SD15, request(width=4096, height=3072, count=3))
    refusal, text = caught.value, str(caught.value)
    assert refusal.needed > USABLE * refusal.free == USABLE * facts.memory_free
    assert f"{refusal.needed / 1e9:.2f} GB" in text
    assert f"{refusal.free / 1e9:.2f} GB" in text
    assert refusal.exit_code == 1
    width, height = (int(text.split(f"--{name} ")[1].split()[0].rstrip(")")) for name in ("width", "height"))
    assert width > height >= 512
    assert plan(facts, SD15, request(width=width, height=height)).peak_bytes <= USABLE * facts.memory_free
    with pytest.raises(MemoryPlanError):
        plan(facts, SD15, request(width=width + 64, height=height + 64))


def test_a_refusal_of_too_many_says_how_many():
    facts = machine("laptop-8gb")
    with pytest.raises(MemoryPlanError) as caught:
        plan(facts, SD15, request(count=10**4))
    count = int(str(caught.value).split("--count ")[1].rstrip(")"))
    assert plan(facts, SD15, request(count=count))
    with pytest.raises(MemoryPlanError):
        plan(facts, SD15, request(count=count + 1))
    none = dataclasses.replace(facts, memory_free=GIB)
    with pytest.raises(MemoryPlanError, match="no size fits"):
        plan(none, SD15, request())
    assert largest_batch(none, SD15, request()) == 0


def test_memory_is_saved_step_by_step():
    """Less memory: first all networks at once goes, then whole pictures, then exact weights; never the other way round."""
    laptop = machine("laptop-8gb")
    seen = []
    for free in range(48, 12, -1):
        facts = dataclasses.replace(laptop, memory_total=32 * GIB, memory_free=free * GIB // 2)
        try:
            found = plan(facts, SD15, request(width=2048, height=2048))
        except MemoryPlanError:
            break
        seen.append((found.offload == "staged", found.vae_tiling, found.eight_bit))
    order = [(False, False, False), (True, False, False), (True, True, False), (True, True, True)]
    assert list(dict.fromkeys(seen)) == order[: len(set(seen))]
    assert len(set(seen)) >= 3


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(MACS), width=sides, height=sides, count=st.integers(1, 16), micro_batch=st.integers(0, 16),
    dtype=st.sampled_from([None, "float32", "float16", "bfloat16"]), free=st.integers(4, 512),
)  # fmt: skip
def test_nothing_breaks_metals_limits(name, width, height, count, micro_batch, dtype, free):
    """Up to 2048² and batches of 16, whatever is wished for: a plan within both limits, or a refusal."""
    facts = dataclasses.replace(machine(name), memory_total=free * GIB, memory_free=free * GIB)
    asked, wishes = (
        request(width=width, height=height, count=count),
        Wishes(micro_batch=micro_batch or None, dtype=dtype),
    )
    task = task_of(SD15, asked)
    try:
        found = plan(facts, SD15, asked, wishes)
    except MemoryPlanError:
        found = None
    if found is None:  # with memory enough, only what was wished for can be refused
        assert free < 32 or micro_batch > 1 or dtype is not None
        return
    assert found.attention == "chunked"
    size, numbers = largest_tensor(found, task)
    assert size < LIMIT_BYTES
    assert numbers < LIMIT_NUMBERS
    layers = [(layer, found.micro_batch * task.rows, found.unet_dtype) for layer in task.unet_layers]
    layers += [
        (layer, found.micro_batch, found.vae_dtype) for layer in (() if found.vae_tiling else task.decoder_layers)
    ]
    for layer, rows, dtype_used in layers:
        if (shape := layer.attention) is not None:
            for element in (DTYPE_BYTES[dtype_used], 4):  # scores and softmax are computed in float32
                pairs, queries = attention_chunk(
                    rows * shape.heads, shape.queries, shape.keys, DTYPE_BYTES[dtype_used], found.attention_bytes
                )
                assert pairs * queries * shape.keys * element < LIMIT_BYTES
                assert pairs * queries * shape.keys < LIMIT_NUMBERS


@given(
    pairs=st.integers(1, 512), queries=st.integers(1, 2**16), keys=st.integers(1, 2**16),
    element=st.sampled_from([2, 4, 8]), budget=st.integers(1, 2**34),
)  # fmt: skip
def test_chunks_stay_within_their_budget(pairs, queries, keys, element, budget):
    some, rows = attention_chunk(pairs, queries, keys, element, budget)
    assert 1 <= some <= pairs
    assert 1 <= rows <= queries
    assert some * rows * keys * element <= max(budget, keys * element)
    assert some == 1 or rows == queries
    if pairs * queries * keys * element <= budget:
        assert (some, rows) == (pairs, queries)


def test_chunks_are_those_that_attention_takes(monkeypatch):
    """The arithmetic proved above is the arithmetic at work: what `chunked` hands on, piece by piece."""
    import torch

    from sfumato.models import attention

    pieces = []

    def watched(q, k, v, mask=None, **_):
        pieces.append((q.flatten(0, -3).shape[0] if q.ndim > 3 else q.shape[0], q.shape[-2]))
        return q @ k.transpose(-1, -2) @ v

    monkeypatch.setattr(attention, "sdpa", watched)
    for batch, heads, queries, keys, budget in [
        (2, 4, 32, 48, 4096),
        (2, 4, 32, 48, 16384),
        (1, 3, 64, 64, 2**20),
        (2, 2, 8, 100, 9),
    ]:
        pieces.clear()
        q, k = torch.randn(batch, heads, queries, 8), torch.randn(batch, heads, keys, 8)
        attention.chunked(budget)(q, k, k)
        assert pieces[0] == attention_chunk(batch * heads, queries, keys, 4, budget)


@settings(max_examples=60, deadline=None)
@given(name=machines, more=st.floats(1, 4), width=sides, height=sides)
def test_more_memory_never_means_a_smaller_batch(name, more, width, height):
    facts = machine(name)
    large = dataclasses.replace(
        facts, memory_total=4 * facts.memory_total, memory_free=int(more * facts.memory_free),
        **({"accelerator_memory_total": 4 * facts.accelerator_memory_total, "accelerator_memory_free": int(more * facts.accelerator_memory_free)} if facts.accelerator == "cuda" else {}),
    )  # fmt: skip
    asked = request(width=width, height=height)
    few, many = largest_batch(facts, SD15, asked), largest_batch(large, SD15, asked)
    assert few <= many
    if few:
        found = plan(facts, SD15, request(width=width, height=height, count=few), Wishes(micro_batch=few))
        assert found.micro_batch == few
    if few < 1024:
        with pytest.raises(MemoryPlanError):
            plan(facts, SD15, request(width=width, height=height, count=few + 1), Wishes(micro_batch=few + 1))


@settings(max_examples=60, deadline=None)
@given(name=machines, width=sides, height=sides, count=st.integers(1, 20), guidance=st.sampled_from([1.0, 7.5]))
def test_a_plan_is_what_its_footprint_says(name, width, height, count, guidance):
    facts, asked = machine(name), request(width=width, height=height, count=count, guidance_scale=guidance)
    try:
        found = plan(facts, SD15, asked)
    except MemoryPlanError:
        found = None
    if found is None:
        assert largest_batch(facts, SD15, asked) < count
        return
    assert found.peak_bytes == footprint(facts, task_of(SD15, asked), found).peak <= USABLE * found.free_bytes
    assert found.micro_batch <= count


def test_custom_schedules_and_pictures_to_start_from():
    facts = machine("h200")
    assert plan(facts, SD15, request(timesteps=(900, 500, 100))).steps == 3
    half = plan(facts, SD15, request(image="photo.png", strength=0.5))
    assert half.steps == 25
    assert half.seconds < plan(facts, SD15, request()).seconds


def test_plans_and_their_modules_need_no_torch():
    code = """
import json, sys
from sfumato.request import GenerateRequest
from sfumato.runtime.choices import published_sizes
from sfumato.runtime.facts import machine
from sfumato.runtime.plan import plan, largest_batch
found = plan(machine("m1-8gb"), published_sizes('sd15'), GenerateRequest(prompt="a fox"))
print(json.dumps([found.peak_bytes, "torch" in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [plan(machine("m1-8gb"), SD15, request()).peak_bytes, False]


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_sizes_of_a_checkpoint(checkpoints, shape):
    import sfumato

    folder = checkpoints(shape)
    sizes = read_sizes(folder)
    pipe = sfumato.DiffusionPipeline.from_pretrained(folder)
    for part in ("text_encoder", "unet", "vae"):
        parameters = list(getattr(pipe, part).parameters())
        assert getattr(sizes, part).parameters == sum(value.numel() for value in parameters)
        assert getattr(sizes, part).stored_bytes == sum(value.nbytes for value in parameters)
    assert sizes.tokens == 20
    size = pipe.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    assert sizes.picture_size == (width * pipe.vae_scale_factor, height * pipe.vae_scale_factor)
    found = plan(machine("laptop-8gb"), sizes, request())
    assert isinstance(found, Plan)
    assert found.peak_bytes < GIB
    with pytest.raises(CheckpointError, match="fp16"):
        read_sizes(folder, "fp16")


def card(gigabytes: int):
    """The simulated card with less memory."""
    memory = gigabytes * GIB
    changes = {"accelerator_memory_total": memory, "accelerator_memory_free": int(0.95 * memory)}
    return dataclasses.replace(machine("rtx-4090"), **changes)


@pytest.mark.parametrize(
    ("family", "gigabytes", "side", "offload", "tiled"),
    [
        ("sdxl", 24, 1024, "none", False),
        ("sdxl", 11, 1024, "none", False),
        ("sdxl", 10, 1024, "staged", False),
        ("sdxl", 8, 1024, "staged", False),
        ("sdxl-refiner", 7, 2048, "staged", True),
        ("sdxl-turbo", 8, 512, "staged", False),
        ("ssd-1b", 6, 2048, "staged", True),
        ("ssd-1b", 4, 1024, "staged", False),
    ],
)
def test_xl_takes_turns_in_memory_and_tiles_before_it_is_refused(family, gigabytes, side, offload, tiled):
    facts, sizes = card(gigabytes), published_sizes(family)
    found = plan(facts, sizes, request(width=side, height=side))
    assert (found.offload, found.vae_tiling) == (offload, tiled)
    assert (found.unet_dtype, found.vae_dtype) == ("float16", "bfloat16")
    assert found.peak_bytes <= USABLE * found.free_bytes
    assert any("one network in memory at a time" in reason for reason in found.reasons) == (offload == "staged")


def laptop(gigabytes: float):
    """The simulated laptop with so many gigabytes free."""
    return dataclasses.replace(machine("laptop-8gb"), memory_total=32 * GIB, memory_free=int(gigabytes * 1e9))


@pytest.mark.parametrize(
    ("free", "light", "tiled"), [(14, False, False), (12, True, False), (8, True, False), (4.8, True, False)]
)
def test_xl_in_eight_bits_only_where_it_does_not_fit_exactly(free, light, tiled):
    found = plan(laptop(free), published_sizes("sdxl"), request(), Wishes(once=True))
    assert (found.unet_dtype, found.eight_bit, found.vae_tiling) == ("float32", light, tiled)
    said = [reason for reason in found.reasons if "8 bits" in reason]
    assert len(said) == light
    if light:
        assert "dB" in said[0]
        assert said[0].endswith("exact ones do not fit")
        exact = plan(laptop(99), published_sizes("sdxl"), request(), Wishes(once=True))
        assert found.peak_bytes < 0.5 * exact.peak_bytes


def test_eight_bits_by_the_users_word():
    sizes = published_sizes("sdxl")
    found = plan(laptop(99), sizes, request(), Wishes(eight_bit=True))
    assert found.eight_bit
    assert any(reason.startswith("U-Net weights in 8 bits") and "as requested" in reason for reason in found.reasons)
    with pytest.raises(MemoryPlanError):
        plan(laptop(8), sizes, request(), Wishes(eight_bit=False))
    with pytest.raises(UsageError, match="eight_bit"):
        Wishes(eight_bit="yes")  # type: ignore[arg-type]


def test_xl_that_does_not_even_fit_in_eight_bits_is_refused_with_numbers():
    # Metal's copy of the weights is in the same memory as the host's.
    cases = [(laptop(3), "sdxl"), (machine("m1-8gb"), "sdxl"), (machine("m1-8gb"), "sdxl-refiner")]
    for facts, family in cases:
        with pytest.raises(MemoryPlanError, match=r"needs at least \d+\.\d+ GB; \d\.\d+ GB are free on") as refused:
            plan(facts, published_sizes(family), request())
        assert refused.value.needed > USABLE * refused.value.free
    # A pruned relative is drawn on the one that has half precision.
    assert plan(machine("m1-8gb"), published_sizes("ssd-1b"), request()).offload == "staged"


def test_a_refiner_has_room_beside_or_not():
    base, refiner = published_sizes("sdxl"), published_sizes("sdxl-refiner")
    for gigabytes, room in ((24, True), (11, False)):
        found = plan(card(gigabytes), base, request())
        assert found.offload == "none"
        assert fits_beside(found, refiner) == room


@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name].encoders])
def test_every_family_is_planned_without_its_files(family):
    found = plan(card(24), published_sizes(family), request())
    assert 0 < found.peak_bytes <= USABLE * found.free_bytes
