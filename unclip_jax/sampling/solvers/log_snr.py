"""Noise levels of the solvers that integrate over the logarithm of the signal-to-noise ratio, as diffusers spaces them.

These are DPM-Solver's family, UniPC and DEIS. Their x is what the network sees, sqrt(a) x0 + sqrt(1 - a) eps.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from unclip_jax.sampling.schedule import alphas_cumprod
from unclip_jax.sampling.solvers.settings import (
    SCHEDULE_DEFAULTS,
    THRESHOLDING_DEFAULTS,
    check_steps,
    check_timesteps,
    noise_schedule,
    trailing_timesteps,
)
from unclip_jax.sampling.solvers.sigmas import Spacing, alpha_of, spaced

DEFAULTS: dict[str, Any] = {
    **SCHEDULE_DEFAULTS,
    **THRESHOLDING_DEFAULTS,
    "solver_order": 2,
    "use_flow_sigmas": False,
    "use_dynamic_shifting": False,
    "timestep_spacing": "linspace",
    "steps_offset": 0,
}
CHOICES: dict[str, tuple[Any, ...]] = {
    "solver_order": (1, 2, 3),
    "final_sigmas_type": ("zero", "sigma_min"),
    "use_flow_sigmas": (False,),
    "use_dynamic_shifting": (False,),
}


def levels(
    settings: Mapping[str, Any], num_inference_steps: int, spacing: Spacing | None, solver: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The timesteps of `num_inference_steps` steps, and signal and noise at both ends of each.

    Args:
        settings: Read with `DEFAULTS` or more.
        num_inference_steps: The number of steps.
        spacing: Over the whole schedule, as in `sigmas.noise_levels`. "lu" is even in the logarithm, like
            "exponential", but the network is given the nearest timestep rather than the one below. None: as
            `timestep_spacing` says.
        solver: The name for error messages.

    Returns:
        Timesteps (steps,) int64, alpha and sigma (steps + 1,) float64. sigma falls; it ends in 0 if final_sigmas_type
        is "zero", and at the lowest level otherwise.

    Raises:
        ValueError: A setting or a number is out of range.
    """
    table = alphas_cumprod(noise_schedule(settings))
    if settings.get("rescale_betas_zero_snr"):
        table[-1] = 2**-24  # diffusers' choice, the least float16: sigma is 4096 there and not infinite
    if not table.all():
        raise ValueError(f"scheduler config: {solver!r} cannot start from a zero signal-to-noise ratio (trained_betas)")
    count = check_steps(num_inference_steps, len(table))
    every = np.sqrt((1 - table) / table)
    if spacing is None:
        timesteps = _timesteps(table, settings, count)
        sigmas = every[timesteps]
    else:
        sigmas = spaced(float(every[-1]), float(every[0]), count, spacing)
        fractional = np.interp(np.log(sigmas), np.log(every), np.arange(len(every)))
        # For a cosine schedule diffusers rounds down whatever the spacing is, in this solver alone.
        down = spacing in ("exponential", "beta")
        down |= solver.startswith("dpm++2m") and settings["beta_schedule"] == "squaredcos_cap_v2"
        timesteps = (fractional if down else fractional.round()).astype(np.int64)
    last = 0 if settings.get("final_sigmas_type") == "zero" else every[0]
    sigmas = np.append(sigmas, last).astype(np.float32).astype(np.float64)
    return timesteps, alpha_of(sigmas), sigmas * alpha_of(sigmas)


def half_log_snr(alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """log(alpha / sigma); infinite where there is no noise."""
    with np.errstate(divide="ignore"):
        return np.log(alpha) - np.log(sigma)


def warm_up(order: int, calls: int, start_step: int) -> np.ndarray:
    """The highest order that the history allows at each evaluation, 1 at number `start_step`: (calls,) int."""
    return np.clip(np.arange(calls) - start_step + 1, 1, order)


def _timesteps(table: np.ndarray, settings: Mapping[str, Any], count: int) -> np.ndarray:
    """The spaced timesteps, falling; unlike DDIM's they leave out the noiseless end of the grid."""
    clipped = 0.5 * (np.log(table) - np.log1p(-table)) < settings.get("lambda_min_clipped", -np.inf)
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
