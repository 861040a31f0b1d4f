"""Solvers of second order with two network evaluations per step (the last: one): Heun's and DPM-Solver-2 ("DPM2").

Karras et al. 2022 (arXiv:2206.00364), algorithm 1, and k-diffusion, as diffusers runs them. One array is remembered.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from unclip_jax.sampling.solvers import linear
from unclip_jax.sampling.solvers.euler import ancestral, toward
from unclip_jax.sampling.solvers.settings import check_start_step, read_settings
from unclip_jax.sampling.solvers.sigmas import DEFAULTS, K_DIFFUSION_BETAS, Spacing, alpha_of, noise_levels
from unclip_jax.sampling.solvers.solver import Solver, make_grid

DPM2 = {**DEFAULTS, **K_DIFFUSION_BETAS}
HEUN = {**DPM2, "clip_sample": False}


def heun(
    config: Mapping[str, Any], num_inference_steps: int, spacing: Spacing | None = None, start_step: int = 0
) -> Solver:
    """Heun's method: Euler's step, repeated with the mean of the slopes at both of its ends.

    Args:
        config: A diffusers scheduler_config.json (HeunDiscreteScheduler).
        num_inference_steps: Steps. There are 2 * num_inference_steps - 1 network evaluations.
        spacing: See `sigmas.noise_levels`.
        start_step: The number of steps to leave out.

    Returns:
        The solver; it is deterministic.

    Raises:
        ValueError: A setting or a number is out of range.
    """
    settings = read_settings(config, HEUN, {"clip_sample": (False,)})
    levels = noise_levels(settings, num_inference_steps, spacing)
    sigmas, alphas = levels.sigmas, levels.alphas
    here, there, alpha, next_alpha = sigmas[:-1], sigmas[1:], alphas[:-1], alphas[1:]
    half = (there - here) / 2
    # Kept is x after half the step by the first slope, the predicted noise.
    first = toward(here, alpha, there, next_alpha) | {"eps": 0 * here, "memory": 0 * here}
    second = {"eps": half[:-1] * next_alpha[:-1], "memory": next_alpha[:-1]}
    kept = {"keep_x": 1 / alpha, "keep_eps": half}
    grid = make_grid(
        _between(levels.timesteps, levels.timesteps[1:]),
        _between(alpha, next_alpha[:-1]) ** 2,
        2 * check_start_step(start_step, len(here)),
        **_both_calls({**first, **kept}, second),
    )
    return linear.table(grid, settings["prediction_type"], remembers=1, scale=levels.scale)


def dpm2(
    config: Mapping[str, Any],
    num_inference_steps: int,
    spacing: Spacing | None = None,
    start_step: int = 0,
    ancestral_steps: bool = False,
) -> Solver:
    """DPM-Solver-2: the slope halfway, in the logarithm of the noise level, is used for the whole step.

    Args:
        config: A diffusers scheduler_config.json (KDPM2DiscreteScheduler or KDPM2AncestralDiscreteScheduler).
        num_inference_steps: Steps. There are 2 * num_inference_steps - 1 network evaluations.
        spacing: See `sigmas.noise_levels`.
        start_step: The number of steps to leave out.
        ancestral_steps: Each step goes below the next noise level, and noise leads up to it.

    Returns:
        The solver; it is stochastic if `ancestral_steps`.

    Raises:
        ValueError: A setting or a number is out of range.
    """
    settings = read_settings(config, DPM2)
    levels = noise_levels(settings, num_inference_steps, spacing)
    sigmas, alphas = levels.sigmas, levels.alphas
    here, there, alpha, next_alpha = sigmas[:-1], sigmas[1:], alphas[:-1], alphas[1:]
    target, up = ancestral(sigmas) if ancestral_steps else (there, 0 * there)
    middle = np.append(np.sqrt(here * target)[:-1], 0)  # the last step is Euler's, to no noise at all
    first = toward(here, alpha, middle, alpha_of(middle)) | {"eps": 0 * here, "memory": 0 * here, "keep_x": 1 / alpha}
    second = {"eps": ((target - here) * next_alpha)[:-1], "memory": next_alpha[:-1]}
    if ancestral_steps:
        first["noise"] = 0 * here
        second["noise"] = (up * next_alpha)[:-1]
    # Halfway, diffusers puts the known part of an image back with the noise of the step's end.
    first["known_noise"] = alpha_of(middle) * there
    second["known_noise"] = (next_alpha * there)[:-1]
    timesteps = levels.timesteps.round() if spacing == "karras" else levels.timesteps
    grid = make_grid(
        _between(timesteps, levels.timestep_of(middle[:-1])),
        _between(alpha, alpha_of(middle[:-1])) ** 2,
        2 * check_start_step(start_step, len(here)),
        **_both_calls(first, second),
    )
    return linear.table(grid, settings["prediction_type"], remembers=1, stochastic=ancestral_steps, scale=levels.scale)


def _between(steps: np.ndarray, halves: np.ndarray) -> np.ndarray:
    """A column of both kinds of evaluations, alternating: (steps,) and (steps - 1,) -> (2 steps - 1,)."""
    both = np.empty(2 * len(steps) - 1)
    both[::2], both[1::2] = steps, halves
    return both


def _both_calls(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The columns of both kinds of evaluations; 0 where the second kind has none."""
    return {name: _between(column, second.get(name, 0 * column[1:])) for name, column in first.items()}
