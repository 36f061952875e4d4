"""Configurations, files and the rest of the scheduler contract against the reference."""

import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils import logging as reference_logging

import sfumato.schedulers as ours
from sfumato.schedulers.configs import CONFIGS

pytestmark = pytest.mark.filterwarnings("ignore")
reference_logging.set_verbosity(50)
NAMES = sorted(CONFIGS)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def trained(name):
    return {} if name.startswith("EDM") else SD


def public(config):
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dict(config).items()
        if not key.startswith("_")
    }


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_defaults_are_the_references(name):
    assert public(getattr(ours, name)().config) == public(getattr(diffusers, name)().config)


@pytest.mark.parametrize("name", NAMES)
def test_compatibles_order_and_length(name):
    theirs, own = getattr(diffusers, name)(), getattr(ours, name)()
    assert {cls.__name__ for cls in own.compatibles} == {cls.__name__ for cls in theirs.compatibles} & set(NAMES)
    assert (own.order, len(own)) == (theirs.order, len(theirs))


@pytest.mark.parametrize("source", NAMES)
def test_from_config_of_every_sibling_means_the_same(source):
    theirs = getattr(diffusers, source).from_config(
        {**SD, "steps_offset": 1, "foreign_key": [1, 2], "_class_name": source}
    )
    own = getattr(ours, source).from_config({**SD, "steps_offset": 1, "foreign_key": [1, 2], "_class_name": source})
    for target in NAMES:
        try:
            expected = getattr(diffusers, target).from_config(theirs.config)
        except (ValueError, NotImplementedError):
            continue
        got = getattr(ours, target).from_config(own.config)
        assert public(got.config) == public(expected.config), (source, target)
        from_reference = getattr(ours, target).from_config(theirs.config)
        assert public(from_reference.config) == public(expected.config), (source, target)
        back = getattr(ours, source).from_config(got.config)
        assert list(back.config["foreign_key"]) == [1, 2]


@pytest.mark.parametrize("source", NAMES)
def test_a_file_of_any_sibling_can_be_loaded_and_sampled(source, tmp_path):
    """Files carry every key, also those at their defaults, which are null for some and mean nothing to others."""
    getattr(diffusers, source)(**trained(source)).save_pretrained(tmp_path)
    for target in NAMES:
        if target == "DPMSolverSDEScheduler":
            continue  # slow to construct, and no other keys than its siblings
        try:
            theirs = getattr(diffusers, target).from_pretrained(tmp_path)
        except (ValueError, NotImplementedError, TypeError):  # TypeError: a null is no number
            getattr(ours, target).from_pretrained(tmp_path)
            continue
        own = getattr(ours, target).from_pretrained(tmp_path)
        changed = {key for key, value in public(own.config).items() if public(theirs.config)[key] != value}
        assert changed <= ({"variance_type"} if target == "DDPMScheduler" else set()), (source, target)
        results = []
        for scheduler in (theirs, own):
            scheduler.set_timesteps(4)
            torch.manual_seed(0)
            x = torch.ones(1, 4, 2, 2)
            results.append(scheduler.step(x, scheduler.timesteps[0], x).prev_sample)
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_files_are_read_by_both(name, tmp_path):
    own = getattr(ours, name)(**trained(name))
    own.save_pretrained(tmp_path / "own")
    theirs = getattr(diffusers, name).from_pretrained(tmp_path / "own")
    assert public(theirs.config) == public(own.config)
    theirs.save_pretrained(tmp_path / "theirs" / "scheduler")
    again = getattr(ours, name).from_pretrained(tmp_path / "theirs", subfolder="scheduler")
    assert public(again.config) == public(own.config)
    written = [
        json.loads((tmp_path / folder / "scheduler_config.json").read_text()) for folder in ("own", "theirs/scheduler")
    ]
    assert set(written[0]) == set(written[1]) - {"solver_p"}
    assert written[0]["_class_name"] == name


@pytest.mark.parametrize("name", NAMES)
def test_add_noise_and_start_level(name):
    results = []
    x, noise = (torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    for library in (diffusers, ours):
        scheduler = getattr(library, name)(
            **trained(name), **({"skip_prk_steps": True} if name == "PNDMScheduler" else {})
        )
        scheduler.set_timesteps(10)
        start = 4 * scheduler.order
        single = scheduler.timesteps[start : start + 1].repeat(2)
        results.append([scheduler.add_noise(x, noise, scheduler.timesteps[torch.tensor([2, 6])])])
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
        results[-1].append(scheduler.add_noise(x, noise, single))
    for theirs, own in zip(*results, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scheduler.table(start).noised(x, noise), results[0][1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"])
def test_get_velocity(name):
    x, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    results = []
    for library in (diffusers, ours):
        scheduler = getattr(library, name)(**SD)
        scheduler.set_timesteps(10)
        results.append(scheduler.get_velocity(x, noise, scheduler.timesteps[torch.tensor([2, 6])]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("DDPMScheduler", {"timesteps": [900, 500, 20, 0]}),
        ("EulerDiscreteScheduler", {"timesteps": [900, 500.5, 20]}),
        ("EulerDiscreteScheduler", {"sigmas": [14.6, 6.5, 3.9, 1.0, 0.15, 0.0]}),
        ("HeunDiscreteScheduler", {"timesteps": [900, 500, 20]}),
        ("DPMSolverMultistepScheduler", {"timesteps": [999, 850, 736, 645, 24]}),
        ("DPMSolverSinglestepScheduler", {"timesteps": [999, 850, 736, 645]}),
        ("UniPCMultistepScheduler", {"sigmas": np.array([1.0, 0.8, 0.3, 0.1])}),
    ],
)
def test_custom_grids(name, arguments):
    results = []
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if name.startswith("UniPC") else {}
    for library in (diffusers, ours):
        scheduler = getattr(library, name)(**SD, **flow)
        scheduler.set_timesteps(**arguments)
        x, generator = torch.ones(1, 4, 3, 3), torch.Generator().manual_seed(0)
        extra = {"generator": generator} if name == "DDPMScheduler" else {}
        for t in scheduler.timesteps:
            x = scheduler.step(torch.tanh(scheduler.scale_model_input(x, t)), t, x, **extra).prev_sample
        results.append((scheduler.timesteps, x, getattr(scheduler, "sigmas", None)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"DDIMScheduler", "DDPMScheduler", "PNDMScheduler"}))
def test_a_late_start_is_found_by_timestep(name):
    """Without `set_begin_index` the first step looks its timestep up, taking the second of two equal ones."""
    options = {"noise_sampler_seed": 1} if name == "DPMSolverSDEScheduler" else {}
    results = []
    for library in (diffusers, ours):
        scheduler = getattr(library, name)(**trained(name), **options)
        scheduler.set_timesteps(6)
        torch.manual_seed(0)
        x = torch.ones(1, 4, 3, 3)
        for t in scheduler.timesteps[2 * scheduler.order :]:
            x = scheduler.step(torch.tanh(scheduler.scale_model_input(x, t)), t, x).prev_sample
        results.append((x, scheduler.step_index))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_integer_timesteps(name):
    results = []
    for library in (diffusers, ours):
        scheduler = getattr(library, name)(**SD)
        scheduler.set_timesteps(6)
        x = torch.ones(1, 4, 3, 3)
        for t in scheduler.timesteps.tolist():
            x = scheduler.step(torch.tanh(x), t, x, return_dict=False)[0]
        results.append(x)
    torch.testing.assert_close(*results)


def test_singlestep_turns_lower_order_final_on_for_good():
    for library in (diffusers, ours):
        scheduler = library.DPMSolverSinglestepScheduler(**SD, final_sigmas_type="sigma_min")
        scheduler.set_timesteps(20)
        assert scheduler.config.lower_order_final is False
        scheduler.set_timesteps(21)
        scheduler.set_timesteps(20)
        assert scheduler.config.lower_order_final is True


def test_beta_quantiles_are_scipys():
    import scipy.stats

    from sfumato.schedulers.grid import beta_quantile

    for i in range(101):
        assert beta_quantile(i / 100) == pytest.approx(scipy.stats.beta.ppf(i / 100, 0.6, 0.6), rel=1e-12, abs=1e-15)
