"""What `sfumato bench` measures: the same work for everyone, in turn, reckoned and told honestly."""

from __future__ import annotations

import itertools
import os
import xml.etree.ElementTree as ElementTree
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sfumato.bench import openvino, ours, reference, report, timing, worker
from sfumato.bench.cases import DEFAULTS, TUNED, Case, Machine, call_cases, guide_cases, picture_peers
from sfumato.bench.plot import bars
from sfumato.bench.report import Report, Setting, run
from sfumato.bench.timing import Clock, Timing, alternate, peak_memory, ratio, timed
from sfumato.bench.worker import Job, Measurement, measure
from sfumato.errors import MissingExtra, OutputError, SfumatoError, UsageError
from sfumato.pipelines.guidance import guide
from sfumato.runtime.facts import machine

ROOT = Path(__file__).parents[2]
HERE = Machine("cpu", "bfloat16", 16)


def test_runs_are_alternated():
    order = []
    calls = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}
    assert alternate(calls, 3) == {"a": [1, 6, 7], "b": [2, 5, 8], "c": [3, 4, 9]}
    assert "".join(order) == "abccbaabc"
    assert ratio([1, 2, 9], [2, 2, 2]) == 1


def test_a_timed_call_is_warm(monkeypatch):
    monkeypatch.setattr(timing.time, "perf_counter", itertools.count(step=2).__next__)
    calls = []
    run = timed(lambda: calls.append(1))
    assert len(calls) == 1
    assert [run(), run()] == [2, 2]
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("limit", "steps", "times", "timing_"),
    [
        # Begin 0; encoding and the first step until 5; two seconds a step; three for decoding.
        (99, 4, [0, 5, 11, 14], Timing(14, 2, 4, 4)),
        (3, 10, [0, 5, 9, 12], Timing(12 + 7 * 2, 2, 3, 10)),
        (1, 1, [0, 5, 8], Timing(8, 5, 1, 1)),
    ],
)
def test_a_clock_reckons_what_was_left_out(monkeypatch, limit, steps, times, timing_):
    monkeypatch.setattr(timing.time, "perf_counter", iter(times).__next__)
    clock = Clock("cpu", limit)
    assert [clock.step(number, steps) for number in range(1, min(limit, steps) + 1)] == [
        number == min(limit, steps) for number in range(1, min(limit, steps) + 1)
    ]
    assert clock.stop() == timing_


def test_peak_memory_is_of_this_process():
    before = peak_memory()
    block = bytearray(os.urandom(1)) * (before + 2**25)
    assert 2**25 < peak_memory() - before < len(block) + 2**25


@pytest.mark.parametrize(
    ("name", "device", "half"),
    [("t4-16gb", "cuda", "float16"), ("m1-8gb", "mps", "float16"), ("laptop-8gb", "cpu", "float32")],
)
def test_the_guides_path(name, device, half):
    path = guide_cases(Machine.of(machine(name), 512), 50)
    assert {case.device for case in path} == {device}
    assert [(case.dtype, case.steps, case.scheduler, case.count) for case in path] == [
        ("float32", 50, None, 1),
        *([(half, 50, None, 1)] if half != "float32" else []),
        (half, 20, "dpmpp_2m", 1),
        (half, 20, "dpmpp_2m", 8),
    ]
    default, tuned = picture_peers(Machine.of(machine(name), 512), 50)
    assert replace(default, library="sfumato", name=path[0].name) == path[0]
    assert replace(tuned, library="sfumato", name=path[-2].name, tuned=False) == path[-2]


def test_peers_are_checked(monkeypatch):
    Setting(folder="x", machine=HERE, peers=("diffusers", "openvino"))
    with pytest.raises(UsageError, match=r"no peer 'difusers' \(did you mean 'diffusers'"):
        Setting(folder="x", machine=HERE, peers=("difusers",))
    with pytest.raises(UsageError, match="openvino is only measured on a CPU, but this machine has cuda"):
        Setting(folder="x", machine=Machine("cuda", "float16", 16), peers=("openvino",))
    with pytest.raises(UsageError, match="runs must be at least 1, not 0"):
        Setting(folder="x", machine=HERE, runs=0)
    monkeypatch.setattr(report, "find_spec", lambda name: None if name == "transformers" else name)
    with pytest.raises(MissingExtra, match="diffusers is not installed; run 'pip install diffusers transformers"):
        Setting(folder="x", machine=HERE, peers=("diffusers",))


# How OpenVINO takes a model apart.
@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("shape", "work"), [("sd15", "unet"), ("sd15", "vae"), ("sdxl", "unet"), ("refiner", "unet")])
def test_everyone_computes_the_same(checkpoints, tmp_path, shape, work):
    folder = checkpoints(shape)
    case = Case(name="", work=work, size=16)
    mine = ours.call(case, folder)()
    results = {
        "diffusers": reference.call(case, folder)(),
        "diffusers, tuned": reference.call(replace(case, tuned=True), folder)(),
        "openvino": openvino.call(case, folder, tmp_path)(),
    }
    assert [path.name for path in tmp_path.glob("*.xml")] == [f"{work}-16.xml"]
    for name, result in results.items():
        if work == "unet":  # theirs are two predictions, ours is guided
            result = guide(*result.chunk(2), 7.5)
        torch.testing.assert_close(mine, result, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("library", [ours, reference])
def test_pictures_of_two_text_encoders(checkpoints, library):
    timing_ = library.picture(Case(name="", size=16, steps=2), checkpoints("sdxl"))(99)
    assert (timing_.counted, timing_.steps) == (2, 2)


@pytest.mark.parametrize("library", [ours, reference])
@pytest.mark.parametrize(("limit", "counted"), [(2, 2), (99, 5)])
def test_pictures_stop_where_they_should(checkpoints, library, limit, counted):
    # Four steps of PNDM are five calls of the U-Net.
    draw = library.picture(Case(name="", size=16, steps=4, tuned=library is reference), checkpoints("sd15"))
    timing_ = draw(limit)
    assert (timing_.counted, timing_.steps) == (counted, 5)
    assert timing_.seconds > timing_.seconds_per_step > 0


def test_a_case_in_a_process_of_its_own(checkpoints):
    folder = str(checkpoints("sd15"))
    case = Case(name="two", size=16, steps=3, scheduler="dpmpp_2m", count=2)
    picture = measure(Job(case, folder, 2, ""))
    assert (picture.counted, picture.steps) == (2, 3)
    assert picture.seconds > (picture.seconds_per_step or 0) > 0
    call = measure(Job(replace(case, work="vae"), folder, None, ""))
    assert call.seconds_per_step is None
    assert 2**26 < call.peak_bytes < 2**30


def test_a_case_that_fails_says_why(tmp_path, monkeypatch):
    with pytest.raises(SfumatoError, match=r"^lost: .*model_index\.json"):
        measure(Job(Case(name="lost"), str(tmp_path), None, ""))
    killer = tmp_path / "killer"
    killer.write_text("#!/bin/sh\nkill -9 $$\n")
    killer.chmod(0o755)
    monkeypatch.setattr(worker.sys, "executable", str(killer))
    with pytest.raises(SfumatoError, match=r"^large: the process was killed, probably because memory ran out"):
        measure(Job(Case(name="large"), str(tmp_path), None, ""))


def ran(monkeypatch, setting: Setting) -> Report:
    """A report of what a machine would take on which half precision is twice as fast and the reference half as fast."""

    def measured(job: Job) -> Measurement:
        case = job.case
        step = (2 if case.library == "diffusers" else 1) * (1 if case.dtype == "float32" else 0.5)
        counted = min(case.steps, job.limit or case.steps)
        return Measurement(step * case.steps, 10**9, step, counted, case.steps)

    monkeypatch.setattr(report, "measure", measured)
    return run(setting, lambda what: nullcontext())


def test_a_report(monkeypatch):
    found = ran(monkeypatch, Setting(folder="x", machine=HERE, runs=2, quick=True, peers=("diffusers", "openvino")))
    assert [(row.name, row.seconds, row.ratio, row.counted) for row in found.pictures] == [
        ("float32, 50 steps", 50, 1, 4),
        ("bfloat16, 50 steps", 25, 0.5, 4),
        ("20 steps of dpmpp_2m", 10, 0.2, 4),
        ("8 images of 20 steps", 10, 0.2, 4),
        (f"diffusers, {DEFAULTS}", 100, 2, 4),
        (f"diffusers, {TUNED}", 20, 0.4, 4),
    ]
    assert [row.library for row in found.unet] == ["sfumato", "diffusers", "diffusers", "openvino"]
    assert [case.name for case in call_cases(HERE, "vae", ("diffusers", "openvino"))] == [row.name for row in found.vae]
    assert found.notes == (
        "twice each, alternating, in a new process after a warm-up; medians are shown",
        "the first 4 steps were timed, and the rest was extrapolated (--quick)",
        f"20 steps of dpmpp_2m takes 0.10 times as long as diffusers, {DEFAULTS}",
        f"20 steps of dpmpp_2m takes 0.50 times as long as diffusers, {TUNED}",
    )


def test_a_report_without_half_precision(monkeypatch):
    found = ran(monkeypatch, Setting(folder="x", machine=Machine("cpu", "float32", 16), runs=1, steps=5))
    assert [row.name for row in found.pictures] == ["float32, 5 steps", "2 steps of dpmpp_2m", "8 images of 2 steps"]
    assert found.unet == found.vae == ()
    assert found.notes[1].startswith("this CPU has no native half precision")
    assert len(found.notes) == 2


def test_no_room_for_temporary_files(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(OutputError, match=r"cannot create a folder for temporary files \(No such file or directory\)"):
        run(Setting(folder="x", machine=HERE), lambda what: nullcontext())


def test_a_plot(monkeypatch):
    found = ran(monkeypatch, Setting(folder="x", machine=HERE, peers=("diffusers",)))
    drawn = ElementTree.fromstring(bars("a <b> & c", found.pictures))
    texts = [one.text for one in drawn.iter() if one.tag.endswith("text")]
    assert texts[0] == "a <b> & c"
    assert {row.name for row in found.pictures} < set(texts)
    background, *rectangles = [one for one in drawn.iter() if one.tag.endswith("rect")]
    widths = [float(one.attrib["width"]) for one in rectangles]
    longest = max(row.seconds for row in found.pictures)
    assert widths == pytest.approx([max(widths) * row.seconds / longest for row in found.pictures], abs=0.1)
    assert float(background.attrib["width"]) > max(widths)


def test_the_page_of_results(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import page, results

    monkeypatch.setattr(results, "KEPT", tmp_path / "kept.json")
    results.keep("unet", [results.Result.of_times("call (openvino)", [1.0, 3.0, 2.0], [4.0, 4.0, 4.0], 0.55)])
    results.keep("memory", [results.Result("plan", "3 GB", "2 GB", 1.5, least=0.9, most=1.1)])
    text = "a\n<!-- results: unet vae -->\nold\n<!-- end -->\nb\n<!-- results: startup -->\nkept\n<!-- end -->\n"
    filled = page.fill(text)
    assert "old" not in filled
    assert "| call (openvino) | 2.00 s | 4.00 s | 0.50 | ≤ 0.55 | 3 |" in filled
    assert filled.endswith("b\n<!-- results: startup -->\nkept\n<!-- end -->\n")
    assert page.fill(filled) == filled
    assert "0.9 to 1.1, missed" in page.fill("<!-- results: memory -->\n<!-- end -->")
    assert page.PLACE.search((ROOT / page.PAGE).read_text(encoding="utf-8"))
