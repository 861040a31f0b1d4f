"""DPM-Solver++, multistep (Lu et al. 2022, arXiv:2211.01095), as diffusers' DPMSolverMultistepScheduler runs it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from unclip_jax.sampling.schedule import alphas_cumprod
from unclip_jax.sampling.solvers import linear
from unclip_jax.sampling.solvers.settings import (
    SCHEDULE_DEFAULTS,
    THRESHOLDING_DEFAULTS,
    check_steps,
    check_timesteps,
    noise_schedule,
    read_settings,
    trailing_timesteps,
)
from unclip_jax.sampling.solvers.solver import Solver, make_grid
from unclip_jax.sampling.solvers.thresholding import threshold_columns

DEFAULTS = {
    **SCHEDULE_DEFAULTS,
    **THRESHOLDING_DEFAULTS,
    "rescale_betas_zero_snr": False,
    "solver_order": 2,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "lower_order_final": True,
    "euler_at_final": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "use_dynamic_shifting": False,
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -np.inf,
    "variance_type": None,
    "timestep_spacing": "linspace",
    "steps_offset": 0,
}
CHOICES = {
    "solver_order": (1, 2, 3),
    "algorithm_type": ("dpmsolver++",),
    # The last three are DEIS's and UniPC's: diffusers takes them for "midpoint", so that their files load here.
    "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "variance_type": (None,),
    **{key: (False,) for key in DEFAULTS if key.startswith("use_")},
}


def dpmpp_2m(config: Mapping[str, Any], num_inference_steps: int, karras: bool = False) -> Solver:
    """DPM-Solver++ with `num_inference_steps` network calls, 1 to the number of training timesteps.

    config: a diffusers scheduler_config.json; its solver_order (1, 2 or 3) is honoured. karras: noise levels spaced
    as by Karras et al. 2022 (arXiv:2206.00364, rho 7) over the whole schedule, whatever `use_karras_sigmas` says, the
    network being told the nearest timestep.

    Two steps at the same noise level, which rounding makes of some large counts, count as one (diffusers divides by
    zero there). Raises ValueError.
    """
    settings = read_settings(config, DEFAULTS, CHOICES)
    table = alphas_cumprod(noise_schedule(settings), "diffusers")
    if settings["rescale_betas_zero_snr"]:
        table[-1] = 2**-24  # diffusers' choice, the least float16: sigma is 4096 there and not infinite
    if not table.all():
        raise ValueError("scheduler config: 'dpm++2m' cannot start from a zero signal-to-noise ratio (trained_betas)")
    count = check_steps(num_inference_steps, len(table))
    every_sigma = np.sqrt((1 - table) / table)
    if karras:
        timesteps, sigmas = _karras(every_sigma, count)
        if settings["beta_schedule"] != "squaredcos_cap_v2":
            timesteps = timesteps.round()
        timesteps = timesteps.astype(np.int64)
    else:
        timesteps = _timesteps(table, settings, count)
        sigmas = every_sigma[timesteps]
    last = every_sigma[0] if settings["final_sigmas_type"] == "sigma_min" else 0
    sigmas = np.append(sigmas, last).astype(np.float32).astype(np.float64)
    alpha = 1 / np.sqrt(sigmas**2 + 1)
    columns = multistep_columns(
        alpha,
        sigmas * alpha,
        _orders(settings, len(timesteps)),
        heun=settings["solver_type"] == "heun",
    )
    return Solver(
        grid=make_grid(timesteps, alpha[:-1] ** 2, **columns, **threshold_columns(settings)),
        prediction_type=settings["prediction_type"],
        init=linear.remember(2),
        step=linear.step,
        stochastic=False,
    )


def _timesteps(table: np.ndarray, settings: Mapping[str, Any], count: int) -> np.ndarray:
    """The spaced timesteps, falling; unlike DDIM's they leave out the end of the grid, where the noise is gone."""
    clipped = 0.5 * (np.log(table) - np.log1p(-table)) < settings["lambda_min_clipped"]
    last = len(table) - int(np.count_nonzero(clipped))
    if settings["timestep_spacing"] == "linspace":
        timesteps = np.linspace(0, last - 1, count + 1).round()[:0:-1].astype(np.int64)
    elif settings["timestep_spacing"] == "leading":
        if last <= count:
            raise ValueError(f"num_inference_steps is {count}; with timestep_spacing 'leading' want 1 to {last - 1}")
        timesteps = np.arange(count, 0, -1) * (last // (count + 1)) + settings["steps_offset"]
    else:
        timesteps = trailing_timesteps(last, len(table), count)
    return check_timesteps(timesteps, settings, count)


def _karras(every_sigma: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Fractional timesteps and their noise levels, falling, (count,) float64 each."""
    low, high = float(every_sigma[0]) ** (1 / 7), float(every_sigma[-1]) ** (1 / 7)
    sigmas = (high + np.linspace(0, 1, count) * (low - high)) ** 7
    return np.interp(np.log(sigmas), np.log(every_sigma), np.arange(len(every_sigma))), sigmas


def _orders(settings: Mapping[str, Any], calls: int) -> np.ndarray:
    """The order of each step: as high as the history allows, lower at the end where that is more stable."""
    orders = np.minimum(np.arange(calls) + 1, settings["solver_order"])
    few = settings["lower_order_final"] and calls < 15
    if few:
        orders[-2:-1] = np.minimum(orders[-2:-1], 2)
    if few or settings["euler_at_final"] or settings["final_sigmas_type"] == "zero":
        orders[-1] = 1
    return orders


def multistep_columns(
    alpha: np.ndarray, sigma: np.ndarray, orders: np.ndarray, heun: bool = False
) -> dict[str, np.ndarray]:
    """Weights of x and of the last three predictions x0, newest first, in each step: (calls,) float64 each.

    alpha, sigma: signal and noise at both ends of all steps, (calls + 1,); sigma falls and may end in 0. orders: 1, 2
    or 3, (calls,). heun: which second-order formula, the paper's (B.1 in DPM-Solver) or the midpoint's.
    """
    with np.errstate(divide="ignore"):
        lambdas = np.log(alpha) - np.log(sigma)  # half the log of the signal-to-noise ratio
    steps = np.diff(lambdas)
    weights = np.zeros((len(orders), 4))
    weights[:, 0] = sigma[1:] / sigma[:-1]
    for i, order in enumerate(orders):
        h = steps[i]
        # The integrals of exp(lambda) times 1, lambda, lambda^2 / 2 over the step, up to a factor.
        constant = -alpha[i + 1] * np.expm1(-h)
        weights[i, 1] = constant
        if h == 0 or order == 1 or steps[i - 1] == 0:
            continue
        linear = alpha[i + 1] * (np.expm1(-h) / h + 1)
        slope = np.array([1, -1, 0]) * h / steps[i - 1]  # of the predictions over lambda, times h
        if order == 2 or steps[i - 2] == 0:
            weights[i, 1:] += (linear if heun else constant / 2) * slope
            continue
        older = np.array([0, 1, -1]) * h / steps[i - 2]
        reach = (steps[i - 1] + steps[i - 2]) / h
        # Twice this would make the formula one of third order; diffusers and the authors' code have it so.
        curve = (slope - older) / reach
        quadratic = alpha[i + 1] * ((np.expm1(-h) + h) / h**2 - 0.5)
        weights[i, 1:] += linear * (slope + curve * steps[i - 1] / h) - quadratic * curve
    names = ("x", "x0", "memory", "memory_2")
    return {**dict(zip(names, weights.T, strict=True)), "keep_x0": np.ones(len(orders))}
