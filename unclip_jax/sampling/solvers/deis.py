"""DEIS (Zhang & Chen 2022, arXiv:2204.13902) in its log-rho form, as diffusers' DEISMultistepScheduler runs it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from unclip_jax.sampling.solvers import linear
from unclip_jax.sampling.solvers.log_snr import CHOICES, DEFAULTS, levels, warm_up
from unclip_jax.sampling.solvers.settings import check_start_step, read_settings
from unclip_jax.sampling.solvers.sigmas import Spacing
from unclip_jax.sampling.solvers.solver import Solver, make_grid

DEIS = {**DEFAULTS, "algorithm_type": "deis", "solver_type": "logrho", "lower_order_final": True}
DEIS_CHOICES = {
    **CHOICES,
    # All but the first of each are other classes', which diffusers takes for the first.
    "algorithm_type": ("deis", "dpmsolver", "dpmsolver++"),
    "solver_type": ("logrho", "midpoint", "heun", "bh1", "bh2"),
    "thresholding": (False,),
}


def deis(
    config: Mapping[str, Any], num_inference_steps: int, spacing: Spacing | None = None, start_step: int = 0
) -> Solver:
    """DEIS: the noise in x as a polynomial in log(sigma / alpha), integrated over sigma / alpha.

    It ends at the lowest noise level, not at zero noise.

    Args:
        config: A diffusers scheduler_config.json. Its solver_order (1, 2 or 3) is honoured; one prediction fewer is
            remembered.
        num_inference_steps: Network evaluations, 1 to the number of training timesteps.
        spacing: See `log_snr.levels`.
        start_step: The number of steps to leave out.

    Returns:
        The solver; it is deterministic.

    Raises:
        ValueError: A setting or a number is out of range.
    """
    settings = read_settings(config, DEIS, DEIS_CHOICES)
    most = settings["solver_order"]
    timesteps, alpha, sigma = levels(settings, num_inference_steps, spacing, "deis")
    calls, start_step = len(timesteps), check_start_step(start_step, len(timesteps))
    orders = warm_up(most, calls, start_step)
    if settings["lower_order_final"] and calls < 15:
        orders[-2:] = np.minimum(orders[-2:], (2, 1)[-len(orders) :])
    rho = sigma / alpha
    weights = np.stack([noise_weights(rho, i, order, most) for i, order in enumerate(orders)]).T * alpha[1:]
    columns = {"x": alpha[1:] / alpha[:-1], **dict(zip(("eps", "memory", "memory_2"), weights, strict=False))}
    if most > 1:
        columns["keep_eps"] = np.ones(calls)
    grid = make_grid(timesteps, alpha[:-1] ** 2, start_step, **columns)
    return linear.table(grid, settings["prediction_type"], remembers=most - 1)


def noise_weights(rho: np.ndarray, step: int, order: int, most: int) -> np.ndarray:
    """The weights of the last `order` noises in the integral of their polynomial over rho in one step.

    Args:
        rho: (steps + 1,), falling. Noises at the same level count as one.
        step: The index of the step.
        order: The number of noises.
        most: The length of the result.

    Returns:
        (most,), newest first.
    """
    nodes, used = [0.0], [0]  # log(rho) above the step's start
    for back in range(1, order):
        node = np.log(rho[step - back] / rho[step])
        if node > nodes[-1]:
            nodes.append(node)
            used.append(back)
    end = np.log(rho[step + 1] / rho[step])
    weights = np.zeros(most)
    for i, node in enumerate(nodes):
        others = np.delete(nodes, i)
        basis = np.atleast_1d(np.poly(others)) / np.prod(node - others)
        weights[used[i]] = rho[step] * _integral_with_exp(basis, end)
    return weights


def _integral_with_exp(polynomial: np.ndarray, end: float) -> float:
    """The integral of polynomial(u) exp(u) from 0 to end; coefficients as numpy.poly gives them."""
    # By parts: p exp(u) - p' exp(u) + p'' exp(u) ...
    total, sign = 0.0, 1
    while polynomial.any():
        total += sign * (np.polyval(polynomial, end) * np.exp(end) - np.polyval(polynomial, 0))
        polynomial, sign = np.polyder(polynomial), -sign
    return total
