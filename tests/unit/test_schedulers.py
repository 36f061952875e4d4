"""Rows, noise, names and errors of the schedulers, without the reference."""

import json
import logging
import math
import subprocess
import sys

import numpy as np
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
    trained = {} if name.startswith("EDM") else SD
    return getattr(schedulers, name)(**trained, **extra, **options)


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
    extra = {"eta": 0.0} if name == "TCDScheduler" else {}  # its own default is 0.3, that of tables 0
    for t in scheduler.timesteps:
        out = torch.tanh(scheduler.scale_model_input(y, t))
        try:
            y = scheduler.step(out, t, y, generator=generator, **extra).prev_sample
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


WRONG_SETTINGS = [
    ({"beta_start": None}, "beta_start must be a number from 0 to 1"),
    ({"beta_start": -1}, "beta_start"),
    ({"beta_start": float("nan")}, "beta_start"),
    ({"beta_end": 10**400}, "beta_end"),
    ({"beta_start": 0, "beta_end": 0}, "beta_start, beta_end and beta_schedule"),
    ({"beta_start": 1, "beta_end": 1}, "leave some image before the last"),
    (
        {"num_train_timesteps": 10**9, "beta_schedule": "squaredcos_cap_v2"},
        "num_train_timesteps must be at most 100000",
    ),
    ({"num_train_timesteps": 0}, "num_train_timesteps"),
    ({"num_train_timesteps": "1000"}, "num_train_timesteps"),
    ({"trained_betas": [[0.1]]}, "trained_betas must be a list of"),
    ({"trained_betas": []}, "trained_betas"),
    ({"beta_schedule": ["linear"]}, "beta_schedule"),
    ({"prediction_type": 5}, "prediction_type"),
]


# EDM's schedulers have sigmas, and no betas.
BETAS = [name for name in CLASSES if "trained_betas" in getattr(schedulers, name).config_class.__dataclass_fields__]


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize(("settings", "says"), WRONG_SETTINGS)
def test_a_setting_that_no_model_was_trained_with(name, settings, says):
    with pytest.raises(ConfigError, match=says) as caught:
        getattr(schedulers, name).from_config(SD | settings)
    assert str(caught.value).startswith(f"{name}: ")


@pytest.mark.parametrize("name", BETAS)
def test_betas_that_end_before_the_last_timestep_are_only_kept(name, tmp_path):
    cls = getattr(schedulers, name)
    cls(trained_betas=np.array([0.1, 0.3])).save_pretrained(tmp_path)
    scheduler, x = cls.from_pretrained(tmp_path), torch.ones(1, 4, 2, 2)
    assert scheduler.betas.tolist() == pytest.approx([0.1, 0.3])
    t = torch.tensor([1.0])
    uses = [lambda: scheduler.set_timesteps(2), lambda: scheduler.add_noise(x, x, t)]
    uses += [lambda: scheduler.step(x, t[0], x)] if name not in ("DDIMScheduler", "PNDMScheduler") else []
    for use in uses:
        with pytest.raises(ConfigError, match=f"{name}: trained_betas has 2 entries for 1000 .* num_train_timesteps=2"):
            use()


def test_the_halves_of_pndm_say_what_comes_first():
    scheduler, x = schedulers.PNDMScheduler(), torch.ones(1, 4, 2, 2)
    for step in (scheduler.step_prk, scheduler.step_plms):
        with pytest.raises(UsageError, match="call set_timesteps first"):
            step(x, 1, x)
    scheduler.set_timesteps(10)
    with pytest.raises(UsageError, match="call step_prk for all 12 prk_timesteps first"):
        scheduler.step_plms(x, 1, x)
    scheduler.ets = [x, x, x]
    assert len(scheduler.ets) == 3
    scheduler.step_plms(x, 1, x)
    with pytest.raises(UsageError, match="there is no warm-up call left"):
        scheduler.step_prk(x, 1, x)


@pytest.mark.parametrize("name", CLASSES)
def test_a_model_trained_on_one_timestep(name):
    options = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    scheduler = getattr(schedulers, name)(num_train_timesteps=1, **options)
    grid = {"original_inference_steps": 1} if name in ("LCMScheduler", "TCDScheduler") else {}
    scheduler.set_timesteps(1, **grid)
    assert len(scheduler.timesteps) == 1


def test_a_sibling_s_setting_is_checked_too_where_it_is_read():
    with pytest.raises(ConfigError, match="sigma_min must be"):
        schedulers.LMSDiscreteScheduler.from_config(SD | {"use_karras_sigmas": True, "sigma_min": "x"})


@pytest.mark.parametrize("config", [None, 5, "x", [1]])
def test_what_is_no_config(config):
    with pytest.raises(UsageError, match="takes a dict of settings"):
        schedulers.DDIMScheduler.from_config(config)


def test_too_many_steps_are_refused_before_they_are_counted_out():
    with pytest.raises(UsageError, match="at most 10000"):
        schedulers.EulerDiscreteScheduler().set_timesteps(10**9)


def test_steps_run_out():
    scheduler = make("EulerDiscreteScheduler")
    scheduler.set_timesteps(1)
    x = torch.zeros(1, 4, 2, 2)
    t = scheduler.timesteps[0]
    scheduler.step(x, t, x)
    with pytest.raises(UsageError, match="all steps are taken"):
        scheduler.step(x, t, x)


@pytest.mark.parametrize(
    ("name", "n", "most", "options"),
    [
        ("DPMSolverMultistepScheduler", 1000, 999, {}),
        ("DPMSolverMultistepScheduler", 999, 998, {"timestep_spacing": "leading", "steps_offset": 1}),
        ("DPMSolverMultistepScheduler", 998, 997, {"timestep_spacing": "trailing"}),  # one step too many, at -1
        ("DPMSolverSinglestepScheduler", 5000, 999, {}),
        ("DEISMultistepScheduler", 1001, 1000, {"timestep_spacing": "trailing"}),
        ("UniPCMultistepScheduler", 100, 99, {"num_train_timesteps": 100}),
        ("LMSDiscreteScheduler", 1001, 1000, {"timestep_spacing": "leading"}),
    ],
)
def test_a_timestep_that_stands_twice_says_how_many_steps_there_may_be(name, n, most, options):
    scheduler, x = make(name, **options), torch.ones(1, 4, 2, 2)
    scheduler.set_timesteps(n)
    for walk in (scheduler.table, lambda: scheduler.step(x, scheduler.timesteps[0], x)):
        with pytest.raises(UsageError, match=f"occurs twice; use at most {most} steps"):
            walk()
    scheduler.set_timesteps(most)
    assert all(math.isfinite(weight) for row in scheduler.table().rows for weight in (row.x, *row.past))


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_noise_predicted_from_pure_noise_names_both_settings(name):
    for options in ({"rescale_betas_zero_snr": True}, {"trained_betas": [0.1, 0.2, 1.0], "num_train_timesteps": 3}):
        scheduler = make(name, timestep_spacing="trailing", **options)
        scheduler.set_timesteps(3)
        with pytest.raises(UsageError, match=r"rescale_betas_zero_snr.*prediction_type to 'v_prediction'"):
            scheduler.table()
        other = type(scheduler).from_config(scheduler.config, prediction_type="v_prediction")
        other.set_timesteps(3)
        assert other.table().rows


@pytest.mark.parametrize("name", CLASSES)
def test_null_stands_for_the_default_but_where_it_means_off(name):
    nulls = dict.fromkeys(CONFIGS[name].keys() - {"beta_start", "beta_end"})  # without which there is no schedule
    built = getattr(schedulers, name).from_config({"_class_name": "DPMSolverMultistepScheduler"} | nulls)
    defaults = getattr(schedulers, name)().config
    for key, default in ((key, CONFIGS[name][key]) for key in nulls):
        assert built.config[key] is False if isinstance(default, bool) else built.config[key] == defaults[key]
    built.set_timesteps(8)
    assert built.table().rows


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
    path.write_text('{"steps_offset": "x"}')
    with pytest.raises(ConfigError, match=r"scheduler_config\.json: DDIMScheduler: steps_offset must be"):
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


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        # AUTOMATIC1111, Forge and Civitai
        ("Euler a", "euler_a"), ("Euler", "euler"), ("LMS Karras", "lms_karras"), ("Heun", "heun"), ("DPM2", "dpm2"),
        ("DPM2 a Karras", "dpm2_a_karras"), ("DPM++ 2M", "dpmpp_2m"), ("DPM++ 2M Karras", "dpmpp_2m_karras"),
        ("DPM++ 2M SDE Karras", "dpmpp_2m_sde_karras"), ("DPM++ 3M SDE", "dpmpp_3m_sde"), ("DPM++ SDE", "dpmpp_sde"),
        ("DDIM", "ddim"), ("PLMS", "pndm"), ("UniPC", "unipc"), ("LCM", "lcm"), ("DPM++ 2M Automatic", "dpmpp_2m"),
        # ComfyUI
        ("euler_ancestral", "euler_a"), ("dpm_2", "dpm2"), ("dpm_2_ancestral", "dpm2_a"), ("uni_pc_bh2", "unipc"),
        ("dpmpp_2m_sde_gpu", "dpmpp_2m_sde"),
        # InvokeAI and the first scripts
        ("k_euler_a", "euler_a"), ("k_dpmpp_2m", "dpmpp_2m"), ("dpmpp_2m_k", "dpmpp_2m_karras"),
        # In short, or as Apple's Swift runner has it
        ("dpm++", "dpmpp_2m"), ("dpmpp", "dpmpp_2m"), ("DPM++ Karras", "dpmpp_2m_karras"), ("dpm++2m", "dpmpp_2m"),
    ],
)  # fmt: skip
def test_names_of_other_programs(theirs, ours):
    assert resolve(theirs) == resolve(ours) == (NAMES[ours].class_name, NAMES[ours].preset)


def test_names_of_classes_and_spacings():
    assert resolve("EulerDiscrete") == resolve("EulerDiscreteScheduler") == ("EulerDiscreteScheduler", {})
    for word in ("exponential", "beta"):
        name, preset = resolve(f"DPM++ 2M {word.title()}")
        assert name == "DPMSolverMultistepScheduler"
        assert preset[f"use_{word}_sigmas"]
        assert not preset["use_karras_sigmas"]
        assert getattr(schedulers, name).from_config(SD, **preset).config[f"use_{word}_sigmas"]


@pytest.mark.parametrize(
    ("name", "near"),
    [("DPM++ 2S a", "'dpmpp_2s'"), ("eulr", "'euler'"), ("ddim karras", "karras'"), ("?", "lists all")],
)
def test_unknown_names_get_near_ones(name, near):
    with pytest.raises(UnknownArgument, match=f"there is no scheduler .*{near}"):
        resolve(name)


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


@pytest.mark.parametrize("wrong", [5, [None], [object()], torch.zeros(2, 3), ["x"]])
def test_timesteps_that_are_no_numbers(wrong):
    with pytest.raises(UsageError, match="timesteps must be a list of numbers"):
        schedulers.DDPMScheduler().set_timesteps(timesteps=wrong)


X = torch.ones(2, 4, 2, 2)


@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize(
    ("values", "says"),
    [
        (([1], X, 3), r"not \[1\], \(2, 4, 2, 2\), 3$"),
        ((X, "x", 3), "not .*, 'x', 3$"),
        ((X, X, None), "not .*, None$"),
        ((X, X, "x"), "not .*, 'x'$"),
        ((X, torch.ones(2, 4, 3, 3), 3), r"not .*, \(2, 4, 3, 3\), 3$"),
        ((X, X, [1, 2, 3]), r"not .*, \[1, 2, 3\]$"),
    ],
)
def test_noise_that_cannot_be_added_is_one_sentence(name, method, values, says):
    with pytest.raises(UsageError, match=f"with one timestep per image, {says}"):
        getattr(make(name), method)(*values)


@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
def test_a_timestep_that_was_not_trained_is_refused_and_a_plain_number_taken(method):
    scheduler = make("DDIMScheduler")
    for timestep in (1000, -1):
        with pytest.raises(UsageError, match="timesteps must be from 0 to 999"):
            getattr(scheduler, method)(X, X, torch.tensor([timestep]))
    call = getattr(scheduler, method)
    assert torch.equal(call(X, X, 7), call(X, X, torch.tensor([7, 7])))
