"""Few-step and EDM schedulers against the reference: what their `set_timesteps` and `step` take that others do not."""

import diffusers
import pytest
import torch
from diffusers.utils import logging as reference_logging

import sfumato.schedulers as ours
from sfumato.errors import ConfigError, UsageError
from support.compare import distance, generator

pytestmark = pytest.mark.filterwarnings("ignore")
reference_logging.set_verbosity(50)

E, V, X0 = "epsilon", "v_prediction", "sample"
START = torch.randn(2, 4, 5, 3, generator=generator(1))
GRIDS = [
    *({"num_inference_steps": n} for n in (1, 2, 4, 8, 50)),
    {"num_inference_steps": 7, "original_inference_steps": 100},
    {"num_inference_steps": 4, "original_inference_steps": 35, "strength": 0.5},
    {"num_inference_steps": 3, "strength": 0.31},
    {"timesteps": [999, 759, 499, 259]},
    {"timesteps": [800]},
    {"timesteps": [999, 601, 300, 7]},
    {"timesteps": [999, 759, 499, 259], "strength": 0.5},  # where the reference noises its last step
]


def model(x, t):
    return torch.tanh(1.3 * x + 0.1 * float(t) / 1000)


def run(library, name, grid, *, start=0, seeds=5, options=None, **step):
    """Every step's latents and what came with them, and where the generators ended."""
    scheduler = getattr(library, name)(**(options or {}))
    scheduler.set_timesteps(**grid)
    if start:
        scheduler.set_begin_index(start)
    draws = [generator(seed) for seed in seeds] if isinstance(seeds, list) else generator(seeds)
    x, results = START * float(scheduler.init_noise_sigma), []
    for t in scheduler.timesteps[start:]:
        out = model(scheduler.scale_model_input(x, t), t)
        results.append(scheduler.step(out, t, x, **step, generator=draws, return_dict=False))
        x = results[-1][0]
    return scheduler, results, draws


def assert_same(name, grid, **options):
    (theirs, expected, their_draws), (own, got, draws) = (
        run(library, name, grid, **options) for library in (diffusers, ours)
    )
    assert torch.equal(own.timesteps, theirs.timesteps)
    assert own.timesteps.dtype == theirs.timesteps.dtype
    assert len(got) == len(expected)
    for mine, other in zip(got, expected, strict=True):
        assert len(mine) == len(other)
        assert all(distance(a, b) < 1e-4 for a, b in zip(mine, other, strict=True))
    pairs = [(draws, their_draws)] if isinstance(draws, torch.Generator) else zip(draws, their_draws, strict=True)
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in pairs)


@pytest.mark.parametrize("prediction", [E, V, X0])
def test_lcm(prediction):
    for grid in GRIDS:
        assert_same("LCMScheduler", grid, options={"prediction_type": prediction})
    assert_same(
        "LCMScheduler", GRIDS[3], start=3, seeds=[1, 2], options={"prediction_type": prediction, "clip_sample": True}
    )


@pytest.mark.parametrize("eta", [0, 0.3, 0.77, 1.0])
@pytest.mark.parametrize("prediction", [E, V, X0])
def test_tcd(prediction, eta):
    for grid in GRIDS:
        assert_same("TCDScheduler", grid, options={"prediction_type": prediction}, eta=eta)
    assert_same("TCDScheduler", GRIDS[3], start=3, seeds=[1, 2], options={"prediction_type": prediction}, eta=eta)


def test_tcd_s_eta_is_rounded_as_the_reference_does():
    """(1 - eta) t is a float32 product there, and in double it falls below a whole number for some."""
    off = 0
    for eta in (0.1, 0.3, 0.7, 0.9):
        grid = {"timesteps": list(range(999, 0, -37))}
        assert_same("TCDScheduler", grid, eta=eta)
        off += sum(int((1 - eta) * t) != int(torch.floor((1 - eta) * torch.tensor(t))) for t in range(1000))
    assert off


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_outputs_have_the_reference_s_names(name):
    theirs, own = (getattr(library, name)() for library in (diffusers, ours))
    for scheduler in (theirs, own):
        scheduler.set_timesteps(4)
    results = [
        scheduler.step(START, scheduler.timesteps[0], START, generator=generator()) for scheduler in (theirs, own)
    ]
    assert list(results[0].keys()) == list(results[1].keys())
    for key in results[0]:
        assert distance(getattr(results[1], key), results[0][key]) < 1e-4
    assert own.previous_timestep(759) == theirs.previous_timestep(759) == 499
    assert own.previous_timestep(own.timesteps[-1]).item() == -1


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
@pytest.mark.parametrize(
    ("grid", "says"),
    [
        ({}, "exactly one"),
        ({"num_inference_steps": 4, "timesteps": [999, 1]}, "exactly one"),
        ({"num_inference_steps": 4, "sigmas": [1.0, 0.5]}, "no custom sigmas"),
        ({"num_inference_steps": 51}, "51 steps, but .* has only 50"),
        ({"num_inference_steps": 8, "strength": 0.1}, "8 steps, but .* has only 5"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"timesteps": [1, 2]}, "must descend"),
        ({"timesteps": [1000, 2]}, "start below 1000"),
        ({"timesteps": [999, 2], "strength": 0.3}, "leaves none"),
    ],
)
def test_grids_that_there_are_not(name, grid, says):
    scheduler = getattr(ours, name)()
    with pytest.raises(UsageError, match=says):
        scheduler.set_timesteps(**grid)
    theirs = getattr(diffusers, name)()
    with pytest.raises((ValueError, TypeError, ZeroDivisionError, IndexError)):
        theirs.set_timesteps(**grid) or theirs.timesteps[0]  # where it takes them, none is left


def test_few_step_options_out_of_bounds():
    with pytest.raises(ConfigError, match="sigma_min must be between 0 and sigma_max"):
        ours.EDMEulerScheduler(sigma_min=81.0)
    for name, value in {"sigma_min": 0.0, "sigma_data": 0.0, "rho": -1.0}.items():
        with pytest.raises(ConfigError, match=f"{name} must be a number from"):
            ours.EDMEulerScheduler(**{name: value})
    with pytest.raises(UsageError, match=r"strength must be from 0 to 1, not 1\.5"):
        ours.LCMScheduler().set_timesteps(4, strength=1.5)
    with pytest.raises(UsageError, match="original_inference_steps must be from 1 to 1000"):
        ours.LCMScheduler().set_timesteps(4, original_inference_steps=1001)
    tcd = ours.TCDScheduler()
    tcd.set_timesteps(4)
    with pytest.raises(UsageError, match="eta must be from 0 to 1"):
        tcd.step(START, 999, START, eta=1.5)


def test_timesteps_off_the_distillation_are_said(caplog):
    scheduler = ours.LCMScheduler()
    scheduler.set_timesteps(timesteps=[999, 759, 500])
    assert "was not distilled on timesteps [500]" in caplog.text


@pytest.mark.parametrize("schedule", ["karras", "exponential"])
@pytest.mark.parametrize("prediction", [E, V])
def test_edm_euler(prediction, schedule):
    options = {"prediction_type": prediction, "sigma_schedule": schedule}
    churn = {"s_churn": 5.0, "s_tmin": 0.1, "s_tmax": 50.0, "s_noise": 1.01}
    for n in (1, 2, 5, 20):
        assert_same("EDMEulerScheduler", {"num_inference_steps": n}, options=options)
        assert_same("EDMEulerScheduler", {"num_inference_steps": n}, options=options, **churn)
        assert_same("EDMEulerScheduler", {"num_inference_steps": n}, options=options, pred_original_sample=START * 0.3)
    assert_same("EDMEulerScheduler", {"num_inference_steps": 5}, options=options, pred_original_sample=START, **churn)
    assert_same("EDMEulerScheduler", {"num_inference_steps": 9}, start=4, seeds=[1, 2], options=options, **churn)


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
@pytest.mark.parametrize(
    "options", [{}, {"sigma_schedule": "exponential"}, {"final_sigmas_type": "sigma_min", "rho": 5.0}]
)
def test_edm_grids_are_equal_to_the_bit(name, options):
    theirs, own = (getattr(library, name)(**options) for library in (diffusers, ours))
    for n in (None, 1, 7, 50):
        if n is not None:
            theirs.set_timesteps(n)
            own.set_timesteps(n)
        assert torch.equal(own.timesteps, theirs.timesteps)
        assert torch.equal(own.sigmas[:-1], theirs.sigmas[:-1])
        if n is not None:  # before, the reference's DPM++ ends at 0 whatever the config says
            assert own.sigmas[-1] == theirs.sigmas[-1]
        assert own.init_noise_sigma == theirs.init_noise_sigma


def test_churned_latents_come_with_the_original_that_the_reference_gives():
    options = {"s_churn": 5.0, "s_tmin": 0.1, "s_tmax": 9.0, "s_noise": 1.01}
    for prediction in (E, V, X0):
        config = {"prediction_type": prediction, "beta_schedule": "scaled_linear"}
        assert_same("EulerDiscreteScheduler", {"num_inference_steps": 10}, options=config, **options)


def test_an_sde_of_order_3_is_finite_where_the_reference_ends():
    options = {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}
    _, results, _ = run(ours, "EDMDPMSolverMultistepScheduler", {"num_inference_steps": 8}, options=options)
    assert all(x.isfinite().all() for (x,) in results)
    with pytest.raises(UnboundLocalError):
        run(diffusers, "EDMDPMSolverMultistepScheduler", {"num_inference_steps": 8}, options=options)


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_edm_noise(name):
    theirs, own = (getattr(library, name)() for library in (diffusers, ours))
    for scheduler in (theirs, own):
        scheduler.set_timesteps(10)
    noise = torch.randn(2, 4, 5, 3, generator=generator(3))
    both = own.timesteps[torch.tensor([2, 6])]
    assert distance(own.add_noise(START, noise, both), theirs.add_noise(START, noise, both)) < 1e-6
    own.set_begin_index(4)
    theirs.set_begin_index(4)
    assert distance(own.add_noise(START, noise, both), theirs.add_noise(START, noise, both)) < 1e-6
    assert distance(own.table(4).noised(START, noise), theirs.add_noise(START, noise, both)) < 1e-6
    if name == "EDMEulerScheduler":
        with pytest.raises(UsageError, match="not an integer index"):
            own.step(START, 3, START)
