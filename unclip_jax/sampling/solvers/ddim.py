"""DDIM (Song et al. 2020, arXiv:2010.02502) as diffusers' DDIMScheduler runs it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from unclip_jax.sampling.schedule import alphas_cumprod
from unclip_jax.sampling.solvers import linear
from unclip_jax.sampling.solvers.settings import (
    SCHEDULE_DEFAULTS,
    THRESHOLDING_DEFAULTS,
    check_eta,
    check_start_step,
    check_steps,
    noise_schedule,
    read_settings,
    spaced_timesteps,
    swapped,
)
from unclip_jax.sampling.solvers.solver import Solver, make_grid
from unclip_jax.sampling.solvers.thresholding import limits

DEFAULTS = {
    **SCHEDULE_DEFAULTS,
    **THRESHOLDING_DEFAULTS,
    "rescale_betas_zero_snr": False,
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "set_alpha_to_one": True,
    "timestep_spacing": "leading",
    "steps_offset": 0,
}


def ddim(config: Mapping[str, Any], num_inference_steps: int, eta: float = 0.0, start_step: int = 0) -> Solver:
    """DDIM with `num_inference_steps` network evaluations, 1 to the number of training timesteps.

    A step from timestep t aims at t - N // num_inference_steps. With "trailing" and "linspace" spacing that is not
    quite the next timestep. Coefficients are computed in float32 in diffusers' order.

    Args:
        config: A diffusers scheduler_config.json.
        num_inference_steps: Network evaluations.
        eta: 0 (deterministic) to 1 (as noisy as DDPM). The solver takes noise at every step whatever eta is, so
            changing eta does not recompile.
        start_step: The number of steps to leave out.

    Returns:
        The solver; it is stochastic.

    Raises:
        ValueError: A setting or a number is out of range.
    """
    settings = read_settings(config, DEFAULTS)
    table = alphas_cumprod(noise_schedule(settings))
    count, eta = check_steps(num_inference_steps, len(table)), check_eta(eta)
    timesteps = spaced_timesteps(settings, count)
    target = timesteps - len(table) // count
    here = table[timesteps]
    there = np.where(target >= 0, table[target], np.float32(1) if settings["set_alpha_to_one"] else table[0])
    if settings["prediction_type"] == "epsilon" and not here.all():
        raise ValueError("scheduler config: prediction_type 'epsilon' cannot start from a zero signal-to-noise ratio")
    sigma = np.float32(eta) * np.sqrt((1 - there) / (1 - here) * (1 - here / there))
    grid = make_grid(
        timesteps, here, check_start_step(start_step, count), **ddim_columns(there, sigma), **limits(settings)
    )
    return linear.table(grid, settings["prediction_type"], stochastic=True)


def ddim_inversion(config: Mapping[str, Any], num_inference_steps: int) -> Solver:
    """DDIM backwards, from an image's latents to the noise from which DDIM makes them.

    `sample` with this solver takes the latents in place of the noise. `ddim` with the same config brings them back, the
    better the more steps. In each evaluation x is one stride of noise below the timestep that the network is given.

    Args:
        config: A diffusers scheduler_config.json. Read by `swapped`, as for diffusers' DDIMInverseScheduler in the
            place of its scheduler: x0 is not limited. The timesteps are those of `ddim`, rising, with "leading" or
            "trailing" spacing.
        num_inference_steps: Network evaluations, 1 to the number of training timesteps.

    Returns:
        The solver; it is deterministic.

    Raises:
        ValueError: A setting or a number is out of range.
    """
    settings = read_settings(swapped(config), DEFAULTS, {"timestep_spacing": ("leading", "trailing")})
    table = alphas_cumprod(noise_schedule(settings))
    count = check_steps(num_inference_steps, len(table))
    timesteps = spaced_timesteps(settings, count)[::-1]
    source = timesteps - len(table) // count
    here = np.where(source >= 0, table[source], np.float32(1) if settings["set_alpha_to_one"] else table[0])
    if settings["prediction_type"] == "sample" and (here == 1).any():
        raise ValueError("scheduler config: set_alpha_to_one is True; want false with prediction_type 'sample'")
    grid = make_grid(timesteps, here, **ddim_columns(table[timesteps], 0 * here), **limits(settings))
    del grid["noise"]
    return linear.table(grid, settings["prediction_type"])


def ddim_columns(there: np.ndarray, sigma: np.ndarray) -> dict[str, np.ndarray]:
    """The weights of a step to alphas_cumprod `there` with noise of standard deviation `sigma`, each (calls,)."""
    return {"x0": np.sqrt(there), "eps": np.sqrt(np.maximum(1 - there - sigma**2, 0)), "noise": sigma}
