"""Recorded steps: on a device that only records and repeats operations, they are the plain steps, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sfumato
from sfumato import GenerateRequest, UNet2DConditionModel
from sfumato.pipelines.conditioning import Conditioning
from sfumato.pipelines.guidance import Guidance
from sfumato.pipelines.moments import Moments
from sfumato.pipelines.replayed import Replayed
from support.checkpoints import UNET, XL, randomize

TIMES = (981.0, 741.0, 501.0, 261.0, 21.0)
# Operations that read values back from a device, so that the host waits for it.
WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal", "aten.is_nonzero")


class FakeGraphs(TorchDispatchMode):
    """Records operations with their tensors, and repeats them on the same memory, as a device's graph does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list = []
        self.recorded = self.replayed = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if str(function).startswith(WAITS):
            raise RuntimeError(f"{function} waits for the device, which a recording must not\nstack")
        result = function(*arguments, **(named or {}))
        self.calls.append((function, arguments, named or {}, result))
        return result

    def capture(self, compute):
        with self:
            result = compute()
        calls, self.calls, self.recorded = self.calls, [], self.recorded + 1

        def replay():
            self.replayed += 1
            for function, arguments, named, recorded in calls:
                again = function(*arguments, **named)
                pairs = zip(recorded, again, strict=True) if isinstance(again, (tuple, list)) else [(recorded, again)]
                for into, values in pairs:
                    if isinstance(into, torch.Tensor) and into is not values:
                        into.copy_(values.clone())

        return replay, result


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def guidance_of(config=UNET, pictures: int = 2, **how) -> Guidance:
    unet, width = randomize(UNet2DConditionModel(**config)), config["cross_attention_dim"]
    told = (randn(1, pictures, 5, width), randn(2, pictures, 5, width))
    more = {}
    if config is XL:
        more["pooled"] = (randn(3, pictures, 40), randn(4, pictures, 40))
        more["sizes"] = (torch.full((pictures, 6), 8.0),) * 2
    return Guidance(unet=unet, conditioning=Conditioning(told, **more), times=TIMES, **{"scale": 5.0, **how})


@torch.no_grad()
def steps(guidance: Guidance, predict, change=lambda step: None) -> list[torch.Tensor]:
    x, outputs = randn(0, guidance.conditioning.pictures, 4, 8, 8), []
    for step, t in enumerate(TIMES):
        change(step)
        guidance.step = (step, len(TIMES))
        outputs.append(predict(x, t))
        x = 0.9 * x - 0.1 * outputs[-1]
    return outputs


def same(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@pytest.mark.parametrize("how", [{}, {"rescale": 0.7}, {"micro_batch": 1}, {"scale": 1.0}, {"tile": 6}], ids=str)
@pytest.mark.parametrize("config", [UNET, XL], ids=["sd", "xl"])
def test_recorded_steps_are_the_plain_ones_bit_for_bit(config, how):
    plain, recorded, graphs = guidance_of(config, **how), guidance_of(config, **how), FakeGraphs()
    expected = steps(plain, plain)
    assert same(expected, steps(recorded, Replayed(recorded, graphs.capture, pytest.fail)))
    assert (graphs.recorded, graphs.replayed) == (1, len(TIMES) - 1)  # the first runs as always


def test_a_changed_scale_prompt_or_batch_is_recorded_again_and_the_last_steps_are_not():
    def change(guidance):
        def at(step):
            if step == 2:
                guidance.steer(2.0, 0.5)
            if step == 4:
                guidance.tell(embeds=randn(9, 4, 5, 24))

        return at

    plain, recorded, graphs = guidance_of(), guidance_of(), FakeGraphs()
    expected = steps(plain, plain, change(plain))
    assert same(expected, steps(recorded, Replayed(recorded, graphs.capture, pytest.fail), change(recorded)))
    assert (graphs.recorded, graphs.replayed) == (1, 1)


def test_a_guidance_interval_keeps_both_of_its_states():
    guidance, graphs = guidance_of(), FakeGraphs()
    replayed = Replayed(guidance, graphs.capture, pytest.fail)
    for _ in range(4):
        for scale in (5.0, 4.0):
            guidance.steer(scale, 0.0)
            with torch.no_grad():
                replayed(randn(0, 2, 4, 8, 8), 741.0)
    assert (graphs.recorded, graphs.replayed) == (0, 0)  # step (0, 1): nothing is left to replay
    guidance.step = (0, 9)
    for scale in (5.0, 4.0, 5.0, 4.0):
        guidance.steer(scale, 0.0)
        with torch.no_grad():
            replayed(randn(0, 2, 4, 8, 8), 741.0)
    assert (graphs.recorded, graphs.replayed) == (2, 4)


def test_what_waits_for_the_device_is_not_recorded_but_computed_and_said_once():
    guidance, graphs, said = guidance_of(), FakeGraphs(), []

    class Waiting(torch.nn.Module):
        def forward(self, x):
            return x * float(x.abs().max() > 0)

    guidance.unet.conv_act = torch.nn.Sequential(torch.nn.SiLU(), Waiting())
    expected = steps(guidance, guidance)
    assert same(expected, steps(guidance, Replayed(guidance, graphs.capture, said.append)))
    (note,) = said
    assert note.startswith("steps were not recorded as a graph, but launched one by one: aten._local_scalar_dense")
    assert graphs.replayed == 0


def test_hooks_repairs_and_networks_beside_the_unet_run_as_always():
    graphs = FakeGraphs()
    hooked, seen = guidance_of(), []
    hooked.unet.mid_block.register_forward_hook(lambda *_: seen.append(1))
    steps(hooked, Replayed(hooked, graphs.capture, pytest.fail))
    assert len(seen) == len(TIMES)
    repaired = guidance_of()
    repaired.unet.compute_dtype = torch.float32
    steered = guidance_of()
    object.__setattr__(steered.conditioning, "steered", (object(),))
    assert repaired.state(randn(0, 2, 4, 8, 8)) is steered.state(randn(0, 2, 4, 8, 8)) is None
    steps(repaired, Replayed(repaired, graphs.capture, pytest.fail))
    assert graphs.recorded == 0


@pytest.mark.parametrize("config", [UNET, XL], ids=["sd", "xl"])
def test_time_embeddings_of_a_schedule_are_one_product_per_layer(config):
    guidance, single = guidance_of(config), guidance_of(config)
    single.times = ()
    layer = guidance.unet.mid_block.resnets[0].time_emb_proj
    calls: list[int] = []
    layer.register_forward_hook(lambda _, given, __: calls.append(given[0].shape[0]))
    for one, other in zip(steps(guidance, guidance), steps(single, single), strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()  # guidance and four steps enlarge the difference
    (read, *_), x = guidance.reads, randn(0, 2, 4, 8, 8)
    assert calls == [len(TIMES) * (4 if config is XL else 1)]
    with torch.no_grad():
        one, other = guidance.moment(x, TIMES[2], read).through(layer), single.moment(x, TIMES[2], read).through(layer)
    assert (one - other).norm() <= 1e-6 * other.norm()


def test_a_long_schedule_is_embedded_in_parts_and_other_timesteps_alone():
    times, moments = tuple(float(t) for t in range(300, 0, -1)), Moments()
    unet, x = randomize(UNet2DConditionModel(**UNET)), randn(0, 1, 4, 8, 8)
    with torch.no_grad():
        for t, rows in ((300.0, 128), (173.0, 128), (172.0, 128), (1.0, 1), (0.5, 1)):
            moment = moments.at(unet, x, t, times, {}, None)
            assert torch.allclose(moment.activated, unet.moment(x, t).activated, rtol=1e-5, atol=1e-6)
            assert len(moments._known) == rows


@pytest.fixture
def graphs(monkeypatch):
    """A run whose device is said to record."""
    graphs = FakeGraphs()
    monkeypatch.setattr("sfumato.pipelines.run.capture_for", lambda device: graphs.capture)
    return graphs


@pytest.mark.parametrize("shape", ["sd15", "sdxl"])
@pytest.mark.parametrize("name", ["dpmpp_2m", "euler_a", "unipc", "heun"])
def test_a_run_draws_the_same_images_from_a_recording(checkpoints, graphs, monkeypatch, shape, name):
    pipe = sfumato.load(checkpoints(shape), device="cpu", dtype=torch.float32, engine="torch")
    request = GenerateRequest(prompt="a photo", steps=6, scheduler=name, seed=3, count=2, width=16, height=16)
    recorded = pipe.generate(request)
    assert graphs.recorded == 1
    assert graphs.replayed >= 5
    monkeypatch.setattr("sfumato.pipelines.run.capture_for", lambda device: None)
    plain = pipe.generate(request)
    assert [one.tobytes() for one in recorded.images] == [one.tobytes() for one in plain.images]


def test_a_callback_that_changes_latents_and_scale_is_obeyed(checkpoints, graphs, monkeypatch):
    pipe = sfumato.StableDiffusionPipeline.from_pretrained(checkpoints())
    pipe.place.wishes = replace(pipe.place.wishes, engine="torch")
    pipe.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": 9, "width": 16, "height": 16, "output_type": "latent"}

    def latents():
        generator = torch.Generator().manual_seed(0)
        return pipe("a photo", generator=generator, callback_on_step_end=obeyed, **how).images

    def obeyed(pipe, index, t, tensors):
        if index == 3:
            pipe._guidance_scale = 3.0
        return {"latents": tensors["latents"] * 0.99}

    recorded = latents()
    assert graphs.recorded == 2
    monkeypatch.setattr("sfumato.pipelines.run.capture_for", lambda device: None)
    assert torch.equal(recorded, latents())
