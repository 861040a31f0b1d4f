"""The linear multistep method (Adams-Bashforth in the noise level, by k-diffusion), as diffusers runs it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from unclip_jax.sampling.solvers import linear
from unclip_jax.sampling.solvers.settings import check_start_step, read_settings
from unclip_jax.sampling.solvers.sigmas import DEFAULTS, Spacing, noise_levels
from unclip_jax.sampling.solvers.solver import Solver, make_grid

ORDER = 4


def lms(
    config: Mapping[str, Any], num_inference_steps: int, spacing: Spacing | None = None, start_step: int = 0
) -> Solver:
    """A linear multistep method of fourth order: one network evaluation per step, three slopes remembered.

    Args:
        config: A diffusers scheduler_config.json (LMSDiscreteScheduler).
        num_inference_steps: Network evaluations, 1 to the number of training timesteps.
        spacing: See `sigmas.noise_levels`.
        start_step: The number of steps to leave out. As in diffusers the remaining steps keep their weights, although
            the slopes before them are then zero.

    Returns:
        The solver; it is deterministic.

    Raises:
        ValueError: A setting or a number is out of range.
    """
    settings = read_settings(config, DEFAULTS)
    levels = noise_levels(settings, num_inference_steps, spacing)
    sigmas, alphas = levels.sigmas, levels.alphas
    here, alpha, next_alpha = sigmas[:-1], alphas[:-1], alphas[1:]
    weights = np.stack([slope_weights(sigmas, i) for i in range(len(here))]).T
    # The newest slope, (x - x0) / sigma, as its two parts: from a high noise level they almost cancel x.
    columns = {"x": (1 + weights[0] / here) / alpha, "x0": -weights[0] / here}
    columns |= dict(zip(("memory", "memory_2", "memory_3"), weights[1:], strict=True))
    columns = {name: column * next_alpha for name, column in columns.items()}
    grid = make_grid(levels.timesteps, alpha**2, check_start_step(start_step, len(here)), **columns, keep_eps=1)
    return linear.table(grid, settings["prediction_type"], remembers=ORDER - 1, scale=levels.scale)


def slope_weights(sigmas: np.ndarray, step: int) -> np.ndarray:
    """The weights of the slopes at this step's start and before, newest first: (ORDER,), zeros where there are none.

    They integrate the polynomial through those slopes over the step.
    """
    here, width = sigmas[step], sigmas[step + 1] - sigmas[step]
    nodes = (sigmas[step - np.arange(min(step + 1, ORDER))] - here) / width
    weights = np.zeros(ORDER)
    for i, node in enumerate(nodes):
        others = np.delete(nodes, i)
        antiderivative = np.polyint(np.atleast_1d(np.poly(others)) / np.prod(node - others))
        weights[i] = np.polyval(antiderivative, 1) * width
    return weights
