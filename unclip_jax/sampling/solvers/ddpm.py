"""Ancestral sampling as in DDPM (Ho et al. 2020, arXiv:2006.11239), as diffusers' DDPMScheduler runs it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from unclip_jax.sampling.schedule import alphas_cumprod
from unclip_jax.sampling.solvers import linear
from unclip_jax.sampling.solvers.settings import (
    SCHEDULE_DEFAULTS,
    THRESHOLDING_DEFAULTS,
    check_start_step,
    check_steps,
    noise_schedule,
    read_settings,
    spaced_timesteps,
)
from unclip_jax.sampling.solvers.solver import Solver, make_grid
from unclip_jax.sampling.solvers.thresholding import limits

DEFAULTS = {
    **SCHEDULE_DEFAULTS,
    **THRESHOLDING_DEFAULTS,
    "rescale_betas_zero_snr": False,
    "variance_type": "fixed_small",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "timestep_spacing": "leading",
    "steps_offset": 0,
}
# The first two are one variance, which diffusers computes in two ways.
CHOICES = {"variance_type": ("fixed_small", "fixed_small_log", "fixed_large")}


def ddpm(config: Mapping[str, Any], num_inference_steps: int, start_step: int = 0) -> Solver:
    """DDPM with `num_inference_steps` network evaluations, 1 to the number of training timesteps; noise at every step.

    Args:
        config: A diffusers scheduler_config.json (DDPMScheduler). Models that predict their variance are refused.
        num_inference_steps: Network evaluations.
        start_step: The number of steps to leave out.

    Returns:
        The solver; it is stochastic.

    Raises:
        ValueError: A setting or a number is out of range.
    """
    settings = read_settings(config, DEFAULTS, CHOICES)
    table = alphas_cumprod(noise_schedule(settings))
    timesteps = spaced_timesteps(settings, check_steps(num_inference_steps, len(table)))
    here = table[timesteps].astype(np.float64)
    there = np.append(here[1:], 1.0)
    if settings["prediction_type"] == "epsilon" and not here.all():
        raise ValueError("scheduler config: prediction_type 'epsilon' cannot start from a zero signal-to-noise ratio")
    share = here / there
    variance = 1 - share if settings["variance_type"] == "fixed_large" else (1 - there) / (1 - here) * (1 - share)
    grid = make_grid(
        timesteps,
        here,
        check_start_step(start_step, len(timesteps)),
        x=np.sqrt(share) * (1 - there) / (1 - here),
        x0=np.sqrt(there) * (1 - share) / (1 - here),
        noise=np.where(timesteps > 0, np.sqrt(np.maximum(variance, 1e-20)), 0),
        **limits(settings),
    )
    return linear.table(grid, settings["prediction_type"], stochastic=True)
