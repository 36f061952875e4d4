"""Rows, noise, names and errors of the schedulers, without the reference."""

import json
import logging
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sfumato.schedulers as schedulers
from sfumato.errors import CheckpointError, ConfigError, OutputError, UnknownArgument, UsageError
from sfumato.schedulers import GaussianNoise, State, advance, predict_original
from sfumato.schedulers.configs import CONFIGS
from sfumato.schedulers.names import NAMES, resolve

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CLASSES = sorted(CONFIGS)
QUIET = {"lower_order_final": True}


def make(name, **options):
    extra = (
        QUIET if name == "DPMSolverSinglestepScheduler" else {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    )
    return getattr(schedulers, name)(**SD, **extra, **options)


def sample(scheduler, x, generators=None, start=0, model=torch.tanh):
    table = scheduler.table(start)
    noise = scheduler.noise_source(x.shape, generators)
    state = State(x * table.init_noise_sigma)
    for row in table.rows:
        state = advance(row, state, model(state.x * row.c_in), noise)
    return state.x


@pytest.mark.parametrize("name", CLASSES)
def test_table_and_step_are_the_same_sampler(name):
    scheduler = make(name, **({"noise_sampler_seed": 3} if name == "DPMSolverSDEScheduler" else {}))
    scheduler.set_timesteps(7)
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    looped = sample(scheduler, x, torch.Generator().manual_seed(1))
    assert scheduler.step_index is None
    y, generator = x * scheduler.init_noise_sigma, torch.Generator().manual_seed(1)
    for t in scheduler.timesteps:
        out = torch.tanh(scheduler.scale_model_input(y, t))
        try:
            y = scheduler.step(out, t, y, generator=generator).prev_sample
        except TypeError:
            y = scheduler.step(out, t, y).prev_sample
    if name != "DDIMScheduler":
        assert len(scheduler.table().rows) == len(scheduler.timesteps)
    torch.testing.assert_close(looped, y, rtol=0, atol=0)


@pytest.mark.parametrize("name", CLASSES)
def test_a_perfect_model_is_sampled_exactly(name):
    """If the model knows the one clean image, every sampler without fresh noise must arrive at it."""
    scheduler = make(name, prediction_type="epsilon", **({"noise_sampler_seed": 3} if "SDE" in name else {}))
    scheduler.set_timesteps(12)
    table, target = scheduler.table(), torch.full((1, 4, 3, 3), 0.3)
    noise = scheduler.noise_source(target.shape, torch.Generator().manual_seed(1))
    state = State(table.noised(target, torch.ones_like(target)))
    for row in table.rows:
        a, b = row.original
        out = (target - a * state.x) / b
        torch.testing.assert_close(predict_original(row, state.x, out), target, rtol=1e-3, atol=1e-3)
        state = advance(row, state, out, noise)
    # DEIS and DDIM's family end at the training's smallest sigma, not at 0.
    assert (state.x - target).abs().max() < 0.05


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(CLASSES), st.integers(2, 4), st.integers(2, 9), st.integers(0, 2**31))
def test_an_image_does_not_depend_on_its_batch(name, batch, n, seed):
    scheduler = make(name)
    scheduler.set_timesteps(n)
    x = torch.randn(batch, 4, 3, 3, generator=torch.Generator().manual_seed(seed))
    generators = [torch.Generator().manual_seed(seed + k) for k in range(batch)]
    together = sample(scheduler, x, generators)
    alone = sample(scheduler, x[1:2], [torch.Generator().manual_seed(seed + 1)])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-6, atol=1e-6)


def test_noise_is_drawn_in_float32_from_each_generator():
    single = GaussianNoise((3, 2), torch.Generator().manual_seed(1))()
    assert torch.equal(single, torch.randn(3, 2, generator=torch.Generator().manual_seed(1)))
    several = GaussianNoise((2, 2), [torch.Generator().manual_seed(k) for k in (1, 2)])()
    assert torch.equal(several[1:], torch.randn(1, 2, generator=torch.Generator().manual_seed(2)))
    with pytest.raises(UsageError, match="2 generators for a batch of 3"):
        GaussianNoise((3, 2), [torch.Generator(), torch.Generator()])


def test_low_precision_latents_are_summed_in_float32_and_cast_once():
    scheduler = make("DPMSolverMultistepScheduler")
    scheduler.set_timesteps(5)
    x = torch.randn(1, 4, 3, 3).half()
    state = advance(scheduler.table().rows[0], State(x), torch.tanh(x))
    assert state.x.dtype == torch.float16
    assert state.past[0].dtype == torch.float32


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("n", [0, -3])
def test_no_steps_is_an_error(name, n):
    with pytest.raises(UsageError, match="at least 1"):
        make(name).set_timesteps(n)


@pytest.mark.parametrize("name", CLASSES)
def test_order_of_calls(name):
    scheduler = make(name)
    with pytest.raises(UsageError, match="set_timesteps"):
        scheduler.table()
    scheduler.set_timesteps(4)
    with pytest.raises(UsageError, match="start = 99"):
        scheduler.table(99)
    if scheduler.order == 2:
        with pytest.raises(UsageError, match="divisible by 2"):
            scheduler.table(1)


def test_exclusive_and_unsupported_options():
    euler = schedulers.EulerDiscreteScheduler()
    with pytest.raises(UsageError, match="exactly one"):
        euler.set_timesteps(5, timesteps=[1.0])
    with pytest.raises(UsageError, match="exactly one"):
        euler.set_timesteps()
    with pytest.raises(UsageError, match="use_karras_sigmas"):
        schedulers.EulerDiscreteScheduler(use_karras_sigmas=True).set_timesteps(timesteps=[9.0, 1.0])
    with pytest.raises(ConfigError, match="only one of"):
        schedulers.EulerDiscreteScheduler(use_karras_sigmas=True, use_beta_sigmas=True)
    with pytest.raises(ConfigError, match=r"PNDMScheduler: prediction_type = 'sample' .* 'epsilon', 'v_prediction'"):
        schedulers.PNDMScheduler(prediction_type="sample")
    with pytest.raises(ConfigError, match="final_sigmas_type"):
        schedulers.DPMSolverMultistepScheduler(algorithm_type="dpmsolver")
    with pytest.raises(ConfigError, match="use_dynamic_shifting"):
        schedulers.UniPCMultistepScheduler(use_dynamic_shifting=True)
    with pytest.raises(UnknownArgument, match="did you mean 'beta_start'"):
        schedulers.DDIMScheduler(beta_strat=1)
    euler.set_timesteps(5)
    with pytest.raises(UsageError, match="integer"):
        euler.step(torch.zeros(1, 4, 2, 2), 3, torch.zeros(1, 4, 2, 2))


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("key", ["timesteps", "sigmas"])
def test_a_custom_grid_is_taken_or_refused_by_name(name, key):
    scheduler = make(
        name, **({"use_flow_sigmas": True} if (name, key) == ("UniPCMultistepScheduler", "sigmas") else {})
    )
    values = {"timesteps": [900, 500, 20], "sigmas": [0.9, 0.5, 0.1]}[key]
    if key in scheduler.custom_grids:
        scheduler.set_timesteps(**{key: values}, device="cpu")
        assert len(scheduler.table().rows) >= 2
    else:
        with pytest.raises(UsageError, match=f"{name} takes no custom {key}"):
            scheduler.set_timesteps(**{key: values}, device="cpu")


def test_steps_run_out():
    scheduler = make("EulerDiscreteScheduler")
    scheduler.set_timesteps(1)
    x = torch.zeros(1, 4, 2, 2)
    t = scheduler.timesteps[0]
    scheduler.step(x, t, x)
    with pytest.raises(UsageError, match="all steps are taken"):
        scheduler.step(x, t, x)


def test_unknown_config_keys_are_kept_and_said_once(caplog):
    caplog.set_level(logging.WARNING, "sfumato")
    scheduler = schedulers.EulerDiscreteScheduler.from_config({"skip_prk_steps": True, "nonsense": 1})
    assert "nonsense" in caplog.text
    assert "skip_prk_steps" not in caplog.text
    assert scheduler.config.nonsense == 1
    assert scheduler.config["skip_prk_steps"] is True
    assert schedulers.PNDMScheduler.from_config(scheduler.config).config.skip_prk_steps is True


def test_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json"):
        schedulers.DDIMScheduler.from_pretrained(tmp_path)
    path = tmp_path / "scheduler_config.json"
    for broken in ("{", "[1]"):
        path.write_text(broken)
        with pytest.raises(CheckpointError):
            schedulers.DDIMScheduler.from_pretrained(tmp_path)
    schedulers.DDIMScheduler(steps_offset=1).save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["scheduler_config.json"]
    assert json.loads(path.read_text())["steps_offset"] == 1
    assert schedulers.DDIMScheduler.from_pretrained(path, steps_offset=2).config.steps_offset == 2
    with pytest.raises(OutputError):
        schedulers.DDIMScheduler().save_pretrained(path)


def test_names_resolve_and_build():
    for name, alias in NAMES.items():
        class_name, preset = resolve(name)
        scheduler = getattr(schedulers, class_name).from_config(SD, **preset)
        assert all(scheduler.config[key] == value for key, value in preset.items())
        assert alias.about
    assert resolve("DPM++-2M-Karras".lower().replace("dpm++-", "dpmpp_"))[0] == "DPMSolverMultistepScheduler"
    with pytest.raises(UnknownArgument, match="did you mean 'euler_a'"):
        resolve("eulera")


def test_names_import_no_torch():
    code = "import sfumato.schedulers.names, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_public_surface_is_what_all_says():
    assert set(schedulers.__all__) == {name for name in dir(schedulers) if not name.startswith("_")}
    assert all(getattr(schedulers, name) for name in schedulers.__all__)


def test_a_brownian_path_per_image():
    scheduler = make("DPMSolverSDEScheduler")
    scheduler.set_timesteps(4)
    row = scheduler.table().rows[0]
    both = scheduler.noise_source((2, 3), [torch.Generator().manual_seed(k) for k in (1, 2)])(row)
    one = scheduler.noise_source((1, 3), [torch.Generator().manual_seed(2)])(row)
    assert torch.equal(both[1:], one)
    assert math.isclose(float(both.std()), 1.0, abs_tol=0.9)


@pytest.mark.parametrize("options", [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}])
def test_a_brownian_path_is_never_asked_outside_itself(options):
    """The path rounds its ends and warns, which is an error here, of a sigma a rounding error outside them."""
    scheduler = make("DPMSolverSDEScheduler", noise_sampler_seed=3, **options)
    for n in (5, 20, 50):
        scheduler.set_timesteps(n)
        assert sample(scheduler, torch.zeros(1, 4, 2, 2)).isfinite().all()
