"""DPM-Solver and DPM-Solver++ as diffusers' DPMSolverMultistepScheduler and DPMSolverSinglestepScheduler run them.

Lu et al. 2022 (arXiv:2206.00927 and arXiv:2211.01095). DPM-Solver++ integrates the predicted x0 over the logarithm of
the signal-to-noise ratio, DPM-Solver the predicted noise. Their "sde" forms draw noise at every step.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from unclip_jax.sampling.solvers import linear
from unclip_jax.sampling.solvers.log_snr import CHOICES, DEFAULTS, half_log_snr, levels, warm_up
from unclip_jax.sampling.solvers.settings import check_start_step, read_settings
from unclip_jax.sampling.solvers.sigmas import Spacing
from unclip_jax.sampling.solvers.solver import Solver, make_grid
from unclip_jax.sampling.solvers.thresholding import threshold_columns

Algorithm = Literal["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"]
SINGLESTEP = {
    **{key: value for key, value in DEFAULTS.items() if key not in ("timestep_spacing", "steps_offset")},
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "lower_order_final": False,
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -np.inf,
    "variance_type": None,
}
MULTISTEP = {
    **DEFAULTS,
    **SINGLESTEP,
    "lower_order_final": True,
    "euler_at_final": False,
    "rescale_betas_zero_snr": False,
}
DPM_CHOICES = {
    **CHOICES,
    # The last is DEIS's, which diffusers reads as "dpmsolver++" so that its files load.
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver", "deis"),
    # The last three are DEIS's and UniPC's: diffusers takes them for "midpoint".
    "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
    "variance_type": (None,),
}


def dpmpp_2m(
    config: Mapping[str, Any],
    num_inference_steps: int,
    spacing: Spacing | None = None,
    start_step: int = 0,
    sde: bool = False,
) -> Solver:
    """DPM-Solver++, multistep, with `num_inference_steps` network evaluations.

    Two steps at the same noise level, which rounding produces for some large counts, count as one (diffusers divides by
    zero there).

    Args:
        config: A diffusers scheduler_config.json. Its solver_order (1, 2 or 3) is honoured; one prediction fewer is
            remembered. Its algorithm_type chooses between DPM-Solver and DPM-Solver++.
        num_inference_steps: Network evaluations, 1 to the number of training timesteps.
        spacing: See `log_snr.levels`. It takes precedence over `use_karras_sigmas` and similar settings.
        start_step: The number of steps to leave out.
        sde: Use the "sde" form, whatever algorithm_type says.

    Returns:
        The solver; its "sde" forms are stochastic.

    Raises:
        ValueError: A setting or a number is out of range.
    """
    name = "dpm++2m-sde" if sde else "dpm++2m"
    settings = read_settings(config, MULTISTEP, DPM_CHOICES)
    algorithm = _algorithm(settings, sde)
    if algorithm == "sde-dpmsolver" and settings["solver_order"] == 3:
        raise ValueError("scheduler config: solver_order is 3; with algorithm_type 'sde-dpmsolver' want 1 or 2")
    timesteps, alpha, sigma = levels(settings, num_inference_steps, spacing, name)
    calls, start_step = len(timesteps), check_start_step(start_step, len(timesteps))
    orders = warm_up(settings["solver_order"], calls, start_step)
    few = settings["lower_order_final"] and calls < 15
    if few:
        orders[-2:-1] = np.minimum(orders[-2:-1], 2)
    if few or settings["euler_at_final"] or settings["final_sigmas_type"] == "zero":
        orders[-1] = 1
    heun, most = settings["solver_type"] == "heun", settings["solver_order"]
    columns = multistep_columns(alpha, sigma, orders, most, heun, algorithm)
    grid = make_grid(timesteps, alpha[:-1] ** 2, start_step, **columns, **threshold_columns(settings))
    return linear.table(grid, settings["prediction_type"], remembers=most - 1, stochastic=sde)


def dpmpp_2s(
    config: Mapping[str, Any], num_inference_steps: int, spacing: Spacing | None = None, start_step: int = 0
) -> Solver:
    """DPM-Solver++, single-step: a step of second (or third) order takes two (or three) evaluations.

    The first evaluations of a step are of lower order.

    Args:
        config: A diffusers scheduler_config.json (DPMSolverSinglestepScheduler). Its solver_order is honoured; one
            prediction fewer is remembered. "sde" forms are refused.
        num_inference_steps: Network evaluations, 1 to the number of training timesteps.
        spacing: As in `dpmpp_2m`.
        start_step: As in `dpmpp_2m`.

    Returns:
        The solver; it is deterministic.

    Raises:
        ValueError: A setting or a number is out of range.
    """
    choices = {**DPM_CHOICES, "algorithm_type": ("dpmsolver++", "dpmsolver", "deis")}
    settings = read_settings(config, SINGLESTEP, choices)
    settings |= {"timestep_spacing": "linspace", "steps_offset": 0}
    algorithm = _algorithm(settings, sde=False)
    timesteps, alpha, sigma = levels(settings, num_inference_steps, spacing, "dpm++2s")
    calls, start_step = len(timesteps), check_start_step(start_step, len(timesteps))
    orders = _singlestep_orders(settings, calls, start_step)
    heun, most = settings["solver_type"] == "heun", settings["solver_order"]
    columns = singlestep_columns(alpha, sigma, orders, most, heun, algorithm)
    grid = make_grid(timesteps, alpha[:-1] ** 2, start_step, **columns, **threshold_columns(settings))
    return linear.table(grid, settings["prediction_type"], remembers=most - 1)


def _algorithm(settings: Mapping[str, Any], sde: bool) -> Algorithm:
    of_noise = settings["algorithm_type"].removeprefix("sde-") == "dpmsolver"
    if of_noise and settings["final_sigmas_type"] == "zero":
        raise ValueError(
            f"scheduler config: algorithm_type is {settings['algorithm_type']!r}, which wants final_sigmas_type "
            "'sigma_min', not 'zero'"
        )
    if of_noise and settings["thresholding"]:
        raise ValueError("scheduler config: thresholding is True; want false with algorithm_type 'dpmsolver'")
    if of_noise:
        return "sde-dpmsolver" if sde else "dpmsolver"
    return "sde-dpmsolver++" if sde else "dpmsolver++"


def _singlestep_orders(settings: Mapping[str, Any], calls: int, start_step: int) -> np.ndarray:
    """The order of each evaluation, counting up to solver_order repeatedly; a last step is never incomplete."""
    order, to_zero = settings["solver_order"], settings["final_sigmas_type"] == "zero"
    orders = np.arange(calls) % order + 1
    if (settings["lower_order_final"] or to_zero) and orders[-1] == order > 1:
        orders[-order:] = (*range(1, order), 1)
    if to_zero:
        orders[-1] = 1
    # A run that begins within a step takes what it has for the step's beginning.
    return np.minimum(orders, warm_up(order, calls, start_step))


class Integrals(NamedTuple):
    """Weights of a prediction's value, slope and half curvature, over the step's width in the log of the SNR."""

    constant: float
    linear: float
    quadratic: float


def integrals(algorithm: Algorithm, alpha: float, sigma: float, h: float) -> Integrals:
    """Exponential integration over a step of width h that ends at signal alpha and noise sigma, as in diffusers."""
    if algorithm.endswith("++"):
        sde = algorithm.startswith("sde")
        width = 2 * h if sde else h
        constant = -alpha * np.expm1(-width)
        if not 0 < width < np.inf:
            return Integrals(constant, 0, 0)
        # The sign of the sde form's half is diffusers', too.
        quadratic = -alpha * ((np.expm1(-width) + width) / width**2 - (-0.5 if sde else 0.5))
        return Integrals(constant, alpha * (np.expm1(-width) / width + 1), quadratic)
    factor = 2 if algorithm.startswith("sde") else 1
    constant = -factor * sigma * np.expm1(h)
    if h == 0:
        return Integrals(constant, 0, 0)
    linear = -factor * sigma * (np.expm1(h) / h - 1)
    return Integrals(constant, linear, -sigma * ((np.expm1(h) - h) / h**2 - 0.5))


def multistep_columns(
    alpha: np.ndarray,
    sigma: np.ndarray,
    orders: np.ndarray,
    most: int,
    heun: bool = False,
    algorithm: Algorithm = "dpmsolver++",
) -> dict[str, np.ndarray]:
    """The weights of x, of the noise and of the last predictions, newest first, in each step.

    Args:
        alpha: (calls + 1,), the signal at both ends of all steps.
        sigma: (calls + 1,), the noise there; it falls and may end in 0.
        orders: (calls,), 1, 2 or 3.
        most: The highest order.
        heun: Use the paper's second-order formula (B.1 in DPM-Solver), else the midpoint's.
        algorithm: Which of the two solvers, and whether in its "sde" form.

    Returns:
        Columns of the grid, (calls,) float64 each.
    """
    steps = np.diff(half_log_snr(alpha, sigma))
    weights = np.zeros((len(orders), 3))
    for i, order in enumerate(orders):
        h = steps[i]
        constant, linear, quadratic = integrals(algorithm, alpha[i + 1], sigma[i + 1], h)
        weights[i, 0] = constant
        if h == 0 or order == 1 or steps[i - 1] == 0:
            continue
        slope = np.array([1, -1, 0]) * h / steps[i - 1]  # of the predictions over lambda, times h
        if order == 2 or steps[i - 2] == 0:
            weights[i] += (linear if heun else constant / 2) * slope
            continue
        older = np.array([0, 1, -1]) * h / steps[i - 2]
        reach = (steps[i - 1] + steps[i - 2]) / h
        # Twice this would make the formula one of third order; diffusers and the authors' code have it so.
        curve = (slope - older) / reach
        weights[i] += linear * (slope + curve * steps[i - 1] / h) + quadratic * curve
    columns = {"x": _shrinkage(algorithm, alpha, sigma), **_history(algorithm, weights, most)}
    if algorithm.startswith("sde"):
        columns["x"] = columns["x"] * (np.exp(-steps) if algorithm.endswith("++") else 1)
        grown = -np.expm1(-2 * steps) if algorithm.endswith("++") else np.expm1(2 * steps)
        columns["noise"] = sigma[1:] * np.sqrt(grown)
    return columns


def singlestep_columns(
    alpha: np.ndarray,
    sigma: np.ndarray,
    orders: np.ndarray,
    most: int,
    heun: bool = False,
    algorithm: Algorithm = "dpmsolver++",
) -> dict[str, np.ndarray]:
    """Weights as in `multistep_columns`; an evaluation of order n steps from where evaluation n - 1 before it started.

    There x was x / shrinkage less what the evaluations since have added, so no x needs to be kept. most: the highest
    order.
    """
    lambdas = half_log_snr(alpha, sigma)
    scale = sigma if algorithm.endswith("++") else alpha
    weights = np.zeros((len(orders), 3))
    added = np.zeros(3)  # to x / scale since the step began, by the predictions, newest first
    for i, order in enumerate(orders):
        start_step = i + 1 - order
        h = lambdas[i + 1] - lambdas[start_step]
        constant, linear, quadratic = integrals(algorithm, alpha[i + 1], sigma[i + 1], h)
        whole = np.zeros(3)
        whole[order - 1] = constant
        # Divided differences from the step's start, times h; none where noise levels are the same.
        to_newest = _slope(0, order - 1, h, lambdas[i] - lambdas[start_step])
        if order == 2:
            whole += (linear if heun else constant / 2) * to_newest
        elif order == 3:
            newest, middle = lambdas[i] - lambdas[start_step], lambdas[i - 1] - lambdas[start_step]
            if heun and newest > middle > 0:
                r0, r1 = newest / h, middle / h
                to_middle = _slope(1, 2, h, middle)
                whole += linear * (r0 * to_middle - r1 * to_newest) / (r0 - r1)
                whole += quadratic * 2 * (to_newest - to_middle) / (r0 - r1)
            else:
                whole += linear * to_newest
        weights[i] = whole
        if order > 1:
            weights[i, 1:] -= scale[i + 1] * added[:-1]
        if i + 1 < len(orders) and orders[i + 1] > 1:
            added = whole / scale[i + 1]
    return {"x": _shrinkage(algorithm, alpha, sigma), **_history(algorithm, weights, most)}


def _slope(newer: int, older: int, h: float, distance: float) -> np.ndarray:
    slope = np.zeros(3)
    if distance > 0:
        slope[newer], slope[older] = h / distance, -h / distance
    return slope


def _shrinkage(algorithm: Algorithm, alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """The factor by which a step multiplies x."""
    scale = sigma if algorithm.endswith("++") else alpha
    return scale[1:] / scale[:-1]


def _history(algorithm: Algorithm, weights: np.ndarray, most: int) -> dict[str, np.ndarray]:
    """The columns of the `most` last predictions; each but the oldest is kept for the next step."""
    kind = "x0" if algorithm.endswith("++") else "eps"
    names = (kind, "memory", "memory_2")[:most]
    keep = {f"keep_{kind}": np.ones(len(weights))} if most > 1 else {}
    return {**dict(zip(names, weights.T, strict=False)), **keep}
