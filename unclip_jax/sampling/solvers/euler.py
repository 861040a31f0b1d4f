"""Euler's method and its ancestral form (Karras et al. 2022, arXiv:2206.00364; k-diffusion), as diffusers runs them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from unclip_jax.sampling.solvers import linear
from unclip_jax.sampling.solvers.settings import check_start_step, read_settings
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
    """Euler's method: one network evaluation per step, no memory; first order.

    Args:
        config: A diffusers scheduler_config.json (EulerDiscreteScheduler).
        num_inference_steps: Network evaluations, 1 to the number of training timesteps.
        spacing: See `sigmas.noise_levels`.
        start_step: The number of steps to leave out.

    Returns:
        The solver; it is deterministic.

    Raises:
        ValueError: A setting or a number is out of range.
    """
    settings = read_settings(config, EULER, CHOICES)
    levels = noise_levels(settings, num_inference_steps, spacing)
    sigmas, alphas = levels.sigmas, levels.alphas
    columns = toward(sigmas[:-1], alphas[:-1], sigmas[1:], alphas[1:])
    start_step = check_start_step(start_step, len(levels.timesteps))
    grid = make_grid(levels.timesteps, alphas[:-1] ** 2, start_step, **columns)
    return linear.table(grid, settings["prediction_type"], scale=levels.scale)


def euler_ancestral(config: Mapping[str, Any], num_inference_steps: int, start_step: int = 0) -> Solver:
    """Euler's method to below the next noise level, then noise up to it: one network evaluation per step, no memory.

    Args:
        config: A diffusers scheduler_config.json (EulerAncestralDiscreteScheduler).
        num_inference_steps: Network evaluations, 1 to the number of training timesteps.
        start_step: The number of steps to leave out.

    Returns:
        The solver; it is stochastic.

    Raises:
        ValueError: A setting or a number is out of range.
    """
    settings = read_settings(config, {**DEFAULTS, "rescale_betas_zero_snr": False})
    levels = noise_levels(settings, num_inference_steps, None)
    sigmas, alphas = levels.sigmas, levels.alphas
    down, up = ancestral(sigmas)
    columns = toward(sigmas[:-1], alphas[:-1], down, alphas[1:])
    start_step = check_start_step(start_step, len(levels.timesteps))
    grid = make_grid(levels.timesteps, alphas[:-1] ** 2, start_step, **columns, noise=up * alphas[1:])
    return linear.table(grid, settings["prediction_type"], stochastic=True, scale=levels.scale)


def toward(sigma: np.ndarray, alpha: np.ndarray, target: np.ndarray, target_alpha: np.ndarray) -> dict[str, np.ndarray]:
    """The weights of x and x0 in a straight line from noise level sigma to target.

    That is x + (target - sigma) eps, rescaled.
    """
    return {"x": target / sigma * target_alpha / alpha, "x0": (1 - target / sigma) * target_alpha}


def ancestral(sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each step: the noise level to step down to, and the deviation of the noise that leads up from there."""
    here, there = sigmas[:-1], sigmas[1:]
    return there**2 / here, there * np.sqrt(1 - (there / here) ** 2)
