"""The linear multistep method (Adams-Bashforth in the noise level, by k-diffusion), as diffusers runs it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from unclip_jax.sampling.solvers import linear
from unclip_jax.sampling.solvers.settings import check_begin, read_settings
from unclip_jax.sampling.solvers.sigmas import DEFAULTS, Spacing, noise_levels
from unclip_jax.sampling.solvers.solver import Solver, make_grid

ORDER = 4


def lms(
    config: Mapping[str, Any], num_inference_steps: int, spacing: Spacing | None = None, start_step: int = 0
) -> Solver:
    """A linear multistep method of fourth order: one network call a step, three slopes remembered.

    config: a diffusers scheduler_config.json (LMSDiscreteScheduler). spacing: see `sigmas.noise_levels`. start_step:
    how many steps are left out; as in diffusers those that are left keep their weights, though the slopes before them
    are zero then. Raises ValueError.
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
    grid = make_grid(levels.timesteps, alpha**2, check_begin(start_step, len(here)), **columns, keep_eps=1)
    return linear.table(grid, settings["prediction_type"], remembers=ORDER - 1, scale=levels.scale)


def slope_weights(sigmas: np.ndarray, step: int) -> np.ndarray:
    """Weights of the slopes at this step's start and before, newest first: (ORDER,), zeros where there are none.

    The integral over the step of the polynomial through those slopes.
    """
    here, width = sigmas[step], sigmas[step + 1] - sigmas[step]
    nodes = (sigmas[step - np.arange(min(step + 1, ORDER))] - here) / width
    weights = np.zeros(ORDER)
    for i, node in enumerate(nodes):
        others = np.delete(nodes, i)
        antiderivative = np.polyint(np.atleast_1d(np.poly(others)) / np.prod(node - others))
        weights[i] = np.polyval(antiderivative, 1) * width
    return weights
