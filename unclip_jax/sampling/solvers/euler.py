"""Euler's method and its ancestral form (Karras et al. 2022, arXiv:2206.00364; k-diffusion), as diffusers runs them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from unclip_jax.sampling.solvers import linear
from unclip_jax.sampling.solvers.settings import check_begin, read_settings
from unclip_jax.sampling.solvers.sigmas import DEFAULTS, Spacing, noise_levels
from unclip_jax.sampling.solvers.solver import Solver, make_grid

EULER = {
    **DEFAULTS,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "sigma_min": None,
    "sigma_max": None,
    "rescale_betas_zero_snr": False,
    "final_sigmas_type": "zero",
}
CHOICES = {
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "final_sigmas_type": ("zero", "sigma_min"),
}


def euler(
    config: Mapping[str, Any], num_inference_steps: int, spacing: Spacing | None = None, start_step: int = 0
) -> Solver:
    """Euler's method: one network call a step, nothing remembered; first order.

    config: a diffusers scheduler_config.json (EulerDiscreteScheduler). spacing: see `sigmas.noise_levels`. start_step:
    how many steps are left out. Raises ValueError.
    """
    settings = read_settings(config, EULER, CHOICES)
    levels = noise_levels(settings, num_inference_steps, spacing)
    sigmas, alphas = levels.sigmas, levels.alphas
    columns = toward(sigmas[:-1], alphas[:-1], sigmas[1:], alphas[1:])
    start_step = check_begin(start_step, len(levels.timesteps))
    grid = make_grid(levels.timesteps, alphas[:-1] ** 2, start_step, **columns)
    return linear.table(grid, settings["prediction_type"], scale=levels.scale)


def euler_ancestral(config: Mapping[str, Any], num_inference_steps: int, start_step: int = 0) -> Solver:
    """Euler's method to below the next noise level, and noise up to it: one network call a step, nothing remembered.

    config: a diffusers scheduler_config.json (EulerAncestralDiscreteScheduler). start_step: how many steps are left
    out. Raises ValueError.
    """
    settings = read_settings(config, {**DEFAULTS, "rescale_betas_zero_snr": False})
    levels = noise_levels(settings, num_inference_steps, None)
    sigmas, alphas = levels.sigmas, levels.alphas
    down, up = ancestral(sigmas)
    columns = toward(sigmas[:-1], alphas[:-1], down, alphas[1:])
    start_step = check_begin(start_step, len(levels.timesteps))
    grid = make_grid(levels.timesteps, alphas[:-1] ** 2, start_step, **columns, noise=up * alphas[1:])
    return linear.table(grid, settings["prediction_type"], stochastic=True, scale=levels.scale)


def toward(sigma: np.ndarray, alpha: np.ndarray, target: np.ndarray, target_alpha: np.ndarray) -> dict[str, np.ndarray]:
    """Weights of x and x0 in a straight line from noise level sigma to target: x + (target - sigma) eps, rescaled."""
    return {"x": target / sigma * target_alpha / alpha, "x0": (1 - target / sigma) * target_alpha}


def ancestral(sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each step: the noise level to go down to, and the deviation of the noise that leads up from there."""
    here, there = sigmas[:-1], sigmas[1:]
    return there**2 / here, there * np.sqrt(1 - (there / here) ** 2)
