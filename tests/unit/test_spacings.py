"""A1111's and ComfyUI's spacings: hand-worked values, and that samplers draw by them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sfumato.errors import UsageError
from sfumato.pipelines.components import choose_scheduler
from sfumato.request import SPACINGS
from sfumato.schedulers import DDIMScheduler, EulerDiscreteScheduler
from sfumato.schedulers.sigma import SigmaScheduler
from sfumato.schedulers.spacings import spaced_sigmas

SD = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
TABLE = SD._train_sigmas


def test_grids_by_hand():
    assert TABLE[[0, -1]] == pytest.approx([0.0291675, 14.6146], rel=1e-4)
    karras = spaced_sigmas("karras", 3, TABLE)
    middle = ((14.614641 ** (1 / 7) + 0.0291675 ** (1 / 7)) / 2) ** 7
    assert karras == pytest.approx([14.614641, middle, 0.0291675], rel=1e-4)
    assert spaced_sigmas("exponential", 3, TABLE)[1] == pytest.approx((14.614641 * 0.0291675) ** 0.5, rel=1e-4)
    # 999, 499.5, 0: between two of training, the mean of their logarithms.
    assert spaced_sigmas("uniform", 3, TABLE)[1] == pytest.approx((TABLE[499] * TABLE[500]) ** 0.5, rel=1e-6)
    assert spaced_sigmas("sgm_uniform", 2, TABLE)[1] == pytest.approx((TABLE[499] * TABLE[500]) ** 0.5, rel=1e-6)
    assert spaced_sigmas("simple", 4, TABLE) == pytest.approx(TABLE[[999, 749, 499, 249]])
    assert spaced_sigmas("ddim_uniform", 4, TABLE) == pytest.approx(TABLE[[751, 501, 251, 1]])
    assert len(spaced_sigmas("ddim_uniform", 30, TABLE)) == 31  # as it has elsewhere
    beta = spaced_sigmas("beta", 3, TABLE)
    assert beta[1] == pytest.approx((TABLE[0] + TABLE[-1]) / 2, rel=1e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    "name", ["euler", "euler_a", "heun", "lms", "dpm2", "dpm2_a", "dpmpp_2m", "dpmpp_2m_sde", "deis"]
)
def test_samplers_draw_by_them(name, spacing):
    scheduler = choose_scheduler(name, SD)
    assert isinstance(scheduler, SigmaScheduler)
    scheduler.set_spacing(spacing, 5)
    wanted = spaced_sigmas(spacing, 5 + scheduler.discards, TABLE)[: -1 if scheduler.discards else None]
    assert scheduler._points[:-1] == pytest.approx(wanted, rel=1e-5)
    assert scheduler._points[-1] == 0
    table = scheduler.table()
    assert all(np.isfinite(float(t)) for t in table.timesteps)
    # The first latents are noise of the largest sigma, whatever form the sampler keeps them in.
    signal, noise = table.init_noise_sigma, float(scheduler._points[0])
    assert signal == pytest.approx(noise) or signal == pytest.approx(noise / (noise**2 + 1) ** 0.5)
    scheduler.set_timesteps(4)
    fresh = choose_scheduler(name, SD)
    fresh.set_timesteps(4)
    assert torch.equal(scheduler.timesteps, fresh.timesteps)
    assert scheduler.table().init_noise_sigma == fresh.table().init_noise_sigma


def test_euler_by_hand():
    """x + (sigma' - sigma) d, with k-diffusion's d = eps."""
    scheduler = choose_scheduler("euler", SD)
    scheduler.set_spacing("karras", 2)
    x, eps = torch.full((1, 1, 1, 1), 3.0), torch.full((1, 1, 1, 1), 0.5)
    after = scheduler.step(eps, scheduler.timesteps[0], x).prev_sample
    high, low = scheduler._points[:2]
    assert after.item() == pytest.approx(3 + (low - high) * 0.5, rel=1e-6)


def test_what_spaces_its_steps_itself():
    import sfumato

    assert not isinstance(DDIMScheduler(), SigmaScheduler)
    with pytest.raises(UsageError, match="spacing must be"):
        sfumato.GenerateRequest(spacing="carras")
    with pytest.raises(UsageError, match="pass one of them"):
        sfumato.GenerateRequest(spacing="karras", sigmas=(3.0, 1.0))
