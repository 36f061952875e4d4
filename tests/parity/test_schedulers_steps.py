"""Every scheduler × prediction type × spacing × sigma option against the reference, step by step, with its noise.

Tolerance: 1e-4 of the largest latent in float32, at every step. Where a combination is ill-conditioned (an eps
recovered from x0 at large sigma, a third-order DEIS on nearly equal nodes), float32 cancels inside the *reference*;
there both sides run in float64, with the reference's casts to float32 lifted, and must agree to 1e-6.
"""

import copy
import inspect
import itertools
import json
import warnings
from contextlib import contextmanager

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils import logging as reference_logging

import sfumato.schedulers as ours
from sfumato.errors import ConfigError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore")
reference_logging.set_verbosity(50)

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
START = torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(1))
SLOW = {"LMSDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE"}

E, V, X0, FLOW = "epsilon", "v_prediction", "sample", "flow_prediction"
RESPACED = [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]
FLOWING = [{"use_flow_sigmas": True, "flow_shift": 3.0}]
SPACED = [{"timestep_spacing": name, "steps_offset": 1} for name in ("linspace", "leading", "trailing")]
CLIPS = [
    {"clip_sample": False},
    {"clip_sample": True},
    {"clip_sample": False, "thresholding": True, "sample_max_value": 2.0},
]
ORDERS = [{"solver_order": order} for order in (1, 2, 3)]
TO_MIN = {"final_sigmas_type": "sigma_min"}
RAMPS = [{"sigma_schedule": "karras"}, {"sigma_schedule": "exponential"}]


def product(*groups):
    return [
        dict(itertools.chain.from_iterable(map(dict.items, combination))) for combination in itertools.product(*groups)
    ]


CASES = {
    "DDIM": ((E, V, X0), product(SPACED, CLIPS, [{}, {"set_alpha_to_one": False}, {"rescale_betas_zero_snr": True}])),
    "DDPM": ((E, V, X0), product(SPACED, CLIPS, [{"variance_type": v} for v in ("fixed_small", "fixed_small_log", "fixed_large")])),
    "PNDM": ((E, V), product(SPACED, [{"skip_prk_steps": True}, {}], [{}, {"set_alpha_to_one": True}])),
    "LMSDiscrete": ((E, V, X0), product(SPACED, RESPACED)),
    "EulerDiscrete": ((E, V, X0), product(SPACED, RESPACED, [{}, TO_MIN, {"interpolation_type": "log_linear"}, {"sigma_min": 0.05, "sigma_max": 10.0}, {"timestep_type": "continuous"}, {"rescale_betas_zero_snr": True}])),
    "EulerAncestralDiscrete": ((E, V), product(SPACED, [{}, {"rescale_betas_zero_snr": True}])),
    "HeunDiscrete": ((E, V, X0), product(SPACED, RESPACED, [{}, {"clip_sample": True}])),
    "KDPM2Discrete": ((E, V), product(SPACED, RESPACED)),
    "KDPM2AncestralDiscrete": ((E, V), product(SPACED, RESPACED)),
    "DPMSolverSDE": ((E, V), product(SPACED, RESPACED)),
    "DPMSolverSinglestep": ((E, V, X0), product(RESPACED + FLOWING, ORDERS, [{"solver_type": "midpoint"}, {"solver_type": "heun"}], [{}, {"algorithm_type": "sde-dpmsolver++"}, {"algorithm_type": "dpmsolver", **TO_MIN}, {"lower_order_final": True, **TO_MIN}, {"thresholding": True}, {"lambda_min_clipped": -1.0}])),
    "DPMSolverMultistep": ((E, V, X0), product(SPACED, [*RESPACED, {"use_lu_lambdas": True}, *FLOWING], ORDERS, [{}, {"algorithm_type": "sde-dpmsolver++"}, {"solver_type": "heun"}, {"solver_type": "heun", "algorithm_type": "sde-dpmsolver++"}, {"euler_at_final": True, **TO_MIN}, {"thresholding": True}, {"lambda_min_clipped": -5.1}, {"algorithm_type": "dpmsolver", **TO_MIN}, {"rescale_betas_zero_snr": True}, {"algorithm_type": "sde-dpmsolver", "solver_order": 2, **TO_MIN}])),
    "DEISMultistep": ((E, V, X0), product(SPACED, RESPACED + FLOWING, ORDERS, [{}, {"lower_order_final": False}, {"thresholding": True}])),
    "UniPCMultistep": ((E, V, X0), product(SPACED, RESPACED + FLOWING, [*ORDERS, {"solver_order": 4}], [{}, TO_MIN, {"disable_corrector": [0, 2]}, {"thresholding": True}, {"solver_type": "bh1", **TO_MIN}, {"predict_x0": False, **TO_MIN}])),
    "LCM": ((E, V, X0), product(CLIPS, [{}, {"set_alpha_to_one": False}, {"timestep_scaling": 5.0}, {"original_inference_steps": 100}, {"rescale_betas_zero_snr": True}])),
    "TCD": ((E, V, X0), product(CLIPS, [{}, {"set_alpha_to_one": False}, {"original_inference_steps": 100}, {"rescale_betas_zero_snr": True}])),
    "EDMEuler": ((E, V), product(RAMPS, [{}, TO_MIN, {"sigma_min": 0.05, "sigma_max": 20.0}, {"sigma_data": 1.0, "rho": 5.0}])),
    "EDMDPMSolverMultistep": ((E, V), [case for case in product(RAMPS, ORDERS, [{}, TO_MIN, {"solver_type": "heun"}, {"algorithm_type": "sde-dpmsolver++"}, {"euler_at_final": True, **TO_MIN}, {"lower_order_final": False, **TO_MIN}, {"thresholding": True}, {"sigma_data": 1.0, "sigma_max": 20.0}]) if case["solver_order"] < 3 or "algorithm_type" not in case]),
}  # fmt: skip


def model(x, t):
    return torch.tanh(1.3 * x + 0.1 * float(t) / 1000)


@contextmanager
def casts_to_float32_lifted():
    """Inside, `.to(float32)` leaves float64 tensors alone."""
    to = torch.Tensor.to
    torch.Tensor.to = lambda self, *a, **k: (
        self if self.dtype == torch.float64 and torch.float32 in (*a, *k.values()) else to(self, *a, **k)
    )
    try:
        yield
    finally:
        torch.Tensor.to = to


def build(library, name, options, cache={}):  # noqa: B006
    if name == "DPMSolverSinglestep":
        options = {key: value for key, value in options.items() if key not in ("timestep_spacing", "steps_offset")}
    if name.startswith("EDM"):
        options = {key: value for key, value in options.items() if key not in (*SD, "timestep_spacing", "steps_offset")}
    if name == "DPMSolverSDE":
        options = options | {"noise_sampler_seed": 3}
    cls = getattr(library, f"{name}Scheduler")
    if library is ours or name not in SLOW or "trained_betas" in options:
        return cls(**options)
    # The reference's constructor works out a thousand steps; these options are only read when steps are set.
    base = {key: value for key, value in options.items() if key in (*SD, "noise_sampler_seed")}
    if name not in cache:
        cache[name] = cls(**base)
    scheduler = copy.deepcopy(cache[name])
    scheduler.register_to_config(**options)
    return scheduler


def run(library, name, options, n, start, dtype=torch.float32):
    scheduler = build(library, name, options)
    scheduler.set_timesteps(n)
    if dtype == torch.float64 and library is diffusers:
        for key in (
            "sigmas",
            "alphas_cumprod",
            "final_alpha_cumprod",
            "one",
            "sigmas_up",
            "sigmas_down",
            "sigmas_interpol",
        ):
            if hasattr(scheduler, key):
                setattr(scheduler, key, getattr(scheduler, key).double())
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start * scheduler.order)
    generator = torch.Generator().manual_seed(5)
    draws = "generator" in inspect.signature(getattr(diffusers, f"{name}Scheduler").step).parameters
    x, steps = START.to(dtype) * float(scheduler.init_noise_sigma), []
    for t in scheduler.timesteps[start * scheduler.order :]:
        out = model(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x, **({"generator": generator} if draws else {})).prev_sample
        steps.append(x)
    return scheduler, torch.stack(steps), generator.get_state()


def distance(a, b):
    scale = a.flatten(1).abs().amax(1).clamp(min=1e-6)
    return float(((a - b).flatten(1).abs().amax(1) / scale).max())


def assert_same(name, options, n, start):
    label = f"{name} {options} n={n} start={start}"
    theirs, expected, state = run(diffusers, name, options, n, start)
    from_noise = (
        name in ("DDIM", "LCM", "TCD") and options.get("rescale_betas_zero_snr") and theirs.timesteps[start] == 999
    )
    if from_noise and options["prediction_type"] == E:  # the reference divides by 0
        with pytest.raises(UsageError, match=r"rescale_betas_zero_snr.*prediction_type"):
            run(ours, name, options, n, start)
        return
    scheduler, got, own_state = run(ours, name, options, n, start)
    assert theirs.timesteps.dtype == scheduler.timesteps.dtype, label
    # Beta quantiles are our own arithmetic: equal to 1e-12, not to the bit.
    torch.testing.assert_close(
        scheduler.timesteps,
        theirs.timesteps,
        rtol=1e-12 if options.get("use_beta_sigmas") else 0,
        atol=1e-12 if options.get("use_beta_sigmas") else 0,
        msg=label,
    )
    if hasattr(theirs, "sigmas"):
        torch.testing.assert_close(scheduler.sigmas, theirs.sigmas, rtol=2e-7, atol=0, msg=label)
    assert torch.equal(state, own_state), f"{label}: the generators have drawn differently"
    if not expected.isfinite().all():  # the reference's 0/0
        assert got.isfinite().all(), label
        return
    if (error := distance(expected, got)) < 1e-4:
        return
    with casts_to_float32_lifted():
        expected = run(diffusers, name, options, n, start, torch.float64)[1]
        got = run(ours, name, options, n, start, torch.float64)[1]
    assert distance(expected, got) < 1e-6, f"{label}: {error:.1e} in float32, {distance(expected, got):.1e} in float64"


@pytest.mark.parametrize(("name", "prediction"), [(name, p) for name, (ps, _) in CASES.items() for p in ps])
def test_every_option_step_by_step(name, prediction):
    _, options = CASES[name]
    for i, chosen in enumerate(options):
        n = (5, 20, 21)[i % 3]
        assert_same(name, SD | chosen | {"prediction_type": prediction}, n, (0, 2, 0, n // 2)[i % 4])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("n", [1, 2, 3, 14, 15, 50, 61])
def test_odd_step_counts(name, n):
    spacing = {"timestep_spacing": "trailing"} if n != 50 else {"timestep_spacing": "leading", "steps_offset": 1}
    warm_up = {"skip_prk_steps": True} if name == "PNDM" else {}
    if name in ("LCM", "TCD"):
        warm_up = {"original_inference_steps": 100}
    assert_same(name, SD | spacing | warm_up, n, 0)


@pytest.mark.parametrize("name", ["DPMSolverSinglestep", "DPMSolverMultistep", "DEISMultistep", "UniPCMultistep"])
def test_flow_prediction(name):
    for flow in ({}, *FLOWING):
        assert_same(name, SD | flow | {"prediction_type": FLOW}, 5, 0)


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp"])
@pytest.mark.parametrize("name", ["DDPM", "HeunDiscrete", "EulerDiscrete", "DPMSolverMultistep"])
def test_beta_schedules(name, schedule):
    extra = {"DDPM": ("sigmoid", "laplace"), "HeunDiscrete": ("exp",)}.get(name, ())
    if schedule not in ("linear", "squaredcos_cap_v2", *extra):
        with pytest.raises(ConfigError, match="beta_schedule"):
            getattr(ours, f"{name}Scheduler")(beta_schedule=schedule)
        return
    theirs, own = (getattr(library, f"{name}Scheduler")(beta_schedule=schedule) for library in (diffusers, ours))
    assert torch.equal(theirs.betas, own.betas)
    assert torch.equal(theirs.alphas_cumprod, own.alphas_cumprod)


def test_lu_and_karras_timesteps_of_a_cosine_schedule_stay_fractional_until_cast():
    for option in ("use_karras_sigmas", "use_lu_lambdas"):
        assert_same(
            "DPMSolverMultistep",
            {"beta_schedule": "squaredcos_cap_v2", option: True, "lambda_min_clipped": -5.1},
            20,
            0,
        )


BETAS = np.linspace(0.001, 0.02, 1200)
BY_BETAS = [
    ({"trained_betas": BETAS[:1000]}, sorted(set(CASES) - {"EDMEuler", "EDMDPMSolverMultistep"})),
    ({"trained_betas": BETAS.tolist()}, ["DDIM", "EulerDiscrete", "DPMSolverMultistep"]),  # more than are visited
    (
        {"trained_betas": BETAS[:1000].tolist(), "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        [
            "DDIM",
            "DDPM",
            "EulerDiscrete",
            "EulerAncestralDiscrete",
            "DPMSolverMultistep",
            "UniPCMultistep",
            "LCM",
            "TCD",
        ],
    ),
]


@pytest.mark.parametrize(("options", "names"), BY_BETAS)
def test_trained_betas(options, names):
    for name in names:
        assert_same(name, {**options, "prediction_type": V}, 5, 0)


def test_trained_betas_are_saved_as_the_reference_saves_them(tmp_path):
    for name in BY_BETAS[0][1]:
        for library in (diffusers, ours):
            cls = getattr(library, f"{name}Scheduler")
            cls(trained_betas=BETAS[:20], num_train_timesteps=20).save_pretrained(tmp_path / library.__name__)
        saved = [
            json.loads((tmp_path / one.__name__ / "scheduler_config.json").read_text()) for one in (diffusers, ours)
        ]
        assert saved[0]["trained_betas"] == saved[1]["trained_betas"]
        loaded = cls.from_pretrained(tmp_path / diffusers.__name__)
        assert torch.equal(loaded.betas, torch.from_numpy(BETAS[:20]).float())


@pytest.mark.parametrize("prediction", [E, V])
@pytest.mark.parametrize("n", [4, 10])
def test_both_halves_of_pndm_by_name(prediction, n):
    """The warm-up and the steps after it under their own names, with the outputs that are kept in between."""
    results = []
    for library in (diffusers, ours):
        scheduler = library.PNDMScheduler(**SD, prediction_type=prediction)
        scheduler.set_timesteps(n)
        x, seen = START, []
        for timesteps, step in (
            (scheduler.prk_timesteps, scheduler.step_prk), (scheduler.plms_timesteps, scheduler.step_plms)
        ):  # fmt: skip
            for t in timesteps:
                x = step(model(x, t), t, x).prev_sample
                seen += [x, torch.stack(scheduler.ets[-3:]), torch.tensor([scheduler.counter, t])]
        results.append(seen)
    assert len(results[0]) == len(results[1]) == 3 * (n + 9)
    for theirs, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("skip", "count"), [(False, 3), (True, 1), (True, 3), (True, 4)])
def test_pndm_continues_from_given_outputs(skip, count):
    results = []
    for library in (diffusers, ours):
        scheduler = library.PNDMScheduler(**SD, skip_prk_steps=skip)
        scheduler.set_timesteps(10)
        scheduler.ets = [START * k for k in (0.4, 0.2, 0.1, 0.3)[-count:]]
        x = scheduler.step_plms(model(START, 501), 501, START, return_dict=False)[0]
        if library is diffusers:
            scheduler.counter += 12  # its second call ever would repeat the first one's step
        results.append(torch.stack([x, scheduler.step_plms(model(x, 401), 401, x).prev_sample]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("reclip", [False, True])
def test_ddim_eta_and_clipped_output(eta, reclip):
    results = []
    for library in (diffusers, ours):
        scheduler = library.DDIMScheduler(**SD)
        scheduler.set_timesteps(10)
        x, generator = START, [torch.Generator().manual_seed(k) for k in range(2)]
        for t in scheduler.timesteps:
            output = scheduler.step(model(x, t), t, x, eta=eta, use_clipped_model_output=reclip, generator=generator)
            x = output.prev_sample
        results.append((x, output.pred_original_sample, generator[1].get_state()))
    for theirs, own in zip(*results, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", [E, V, X0])
def test_euler_churn(prediction):
    results = []
    for library in (diffusers, ours):
        scheduler = library.EulerDiscreteScheduler(**SD, prediction_type=prediction)
        scheduler.set_timesteps(10)
        x, generator = START * scheduler.init_noise_sigma, torch.Generator().manual_seed(3)
        for t in scheduler.timesteps:
            out = model(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(
                out, t, x, s_churn=5.0, s_tmin=0.1, s_tmax=9.0, s_noise=1.01, generator=generator
            ).prev_sample
        results.append((x, generator.get_state()))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-5)
    assert torch.equal(results[1][1], results[0][1])


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_orders(order):
    results = []
    for library in (diffusers, ours):
        scheduler = library.LMSDiscreteScheduler(**SD)
        scheduler.set_timesteps(8)
        x = START * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x, order=order).prev_sample
        results.append(x)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_learned_variance(variance):
    results = []
    for library in (diffusers, ours):
        scheduler = library.DDPMScheduler(**SD, variance_type=variance, clip_sample=False)
        scheduler.set_timesteps(10)
        x, generator = START, torch.Generator().manual_seed(3)
        for t in scheduler.timesteps:
            out = torch.cat([model(x, t), torch.sigmoid(x)], dim=1)
            x = scheduler.step(out, t, x, generator=generator).prev_sample
        results.append(x)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_dpm_solver_ignores_a_learned_variance():
    results = []
    for library in (diffusers, ours):
        scheduler = library.DPMSolverMultistepScheduler(**SD, variance_type="learned_range")
        scheduler.set_timesteps(5)
        x = START[:, :3]  # the reference cuts at three channels
        for t in scheduler.timesteps:
            x = scheduler.step(torch.cat([model(x, t)] * 2, dim=1), t, x).prev_sample
        results.append(x)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["UniPCMultistep", "DPMSolverMultistep", "PNDM", "HeunDiscrete"])
def test_soft_edits_between_steps(name):
    """A callback that blends the latents half-way with something else reaches the result as in the reference."""
    results = []
    for library in (diffusers, ours):
        scheduler = build(library, name, SD | ({"skip_prk_steps": True} if name == "PNDM" else {}))
        scheduler.set_timesteps(8)
        x = START * float(scheduler.init_noise_sigma)
        for t in scheduler.timesteps:
            x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x).prev_sample
            x = 0.7 * x + 0.3 * START.flip(0)
        results.append(x)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inner", ["DDIM", "DPMSolverMultistep"])
def test_unipc_with_another_predictor(inner):
    results = []
    for library in (diffusers, ours):
        kwargs = SD | {"timestep_spacing": "trailing"} | ({"clip_sample": False} if inner == "DDIM" else {})
        predictor = getattr(library, f"{inner}Scheduler")(**kwargs)
        scheduler = library.UniPCMultistepScheduler(**SD, timestep_spacing="trailing", solver_p=predictor)
        scheduler.set_timesteps(8)
        x = START
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), t, x).prev_sample
        results.append(x)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", [3, [3, 8]])
def test_brownian_noise_is_the_references(seed):
    from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

    scheduler = ours.DPMSolverSDEScheduler(**SD, noise_sampler_seed=seed)
    scheduler.set_timesteps(7)
    rows = [row for row in scheduler.table().rows if row.span]
    theirs = BrownianTreeNoiseSampler(START, scheduler._range[0], scheduler._range[1], seed)
    own = scheduler.noise_source(START.shape)
    for row in rows:
        start, end = (torch.tensor(sigma) for sigma in row.span)
        assert torch.equal(own(row), theirs(start, end))


def test_half_precision_is_no_worse_than_the_references():
    for name in ("UniPCMultistep", "EulerDiscrete", "DPMSolverMultistep"):
        exact = run(ours, name, SD, 20, 0, torch.float64)[1][-1]
        errors = []
        for library in (ours, diffusers):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                got = run(library, name, SD, 20, 0, torch.float16)[1][-1]
            errors.append(float((got.double() - exact).pow(2).mean().sqrt()))
        assert errors[0] <= errors[1] * 1.1, (name, errors)
