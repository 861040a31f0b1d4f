"""DDIM (Song et al. 2020, arXiv:2010.02502) as diffusers' DDIMScheduler runs it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.sampling.schedule import alphas_cumprod, to_x0_eps
from unclip_jax.sampling.solvers.settings import (
    SCHEDULE_DEFAULTS,
    THRESHOLDING_DEFAULTS,
    check_eta,
    check_steps,
    noise_schedule,
    read_settings,
    spaced_timesteps,
)
from unclip_jax.sampling.solvers.solver import Row, Solver, make_grid
from unclip_jax.sampling.solvers.thresholding import threshold, threshold_columns

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


def ddim(config: Mapping[str, Any], num_inference_steps: int, eta: float = 0.0) -> Solver:
    """DDIM with `num_inference_steps` network calls, 1 to the number of training timesteps.

    config: a diffusers scheduler_config.json; eta: 0 (deterministic) to 1 (as noisy as DDPM). The solver takes noise
    at every step whatever eta is, so that changing eta compiles nothing.

    A step from timestep t aims at t - N // num_inference_steps, which with "trailing" and "linspace" spacing is not
    quite the next timestep. Coefficients are computed in float32 in diffusers' order. Raises ValueError.
    """
    settings = read_settings(config, DEFAULTS)
    table = alphas_cumprod(noise_schedule(settings), "diffusers")
    count, eta = check_steps(num_inference_steps, len(table)), check_eta(eta)
    timesteps = spaced_timesteps(settings, count)
    target = timesteps - len(table) // count
    here = table[timesteps]
    there = np.where(target >= 0, table[target], np.float32(1) if settings["set_alpha_to_one"] else table[0])
    if settings["prediction_type"] == "epsilon" and not here.all():
        raise ValueError("scheduler config: prediction_type 'epsilon' cannot start from a zero signal-to-noise ratio")
    if not settings["clip_sample_range"] > 0:
        raise ValueError(f"scheduler config: clip_sample_range is {settings['clip_sample_range']!r}; want above 0")
    columns = threshold_columns(settings)
    if not columns:
        columns = {"clip": settings["clip_sample_range"] if settings["clip_sample"] else np.inf}
    sigma = np.float32(eta) * np.sqrt((1 - there) / (1 - here) * (1 - here / there))
    return Solver(
        grid=make_grid(timesteps, here, **ddim_columns(there, sigma), **columns),
        prediction_type=settings["prediction_type"],
        init=no_state,
        step=thresholded_step if settings["thresholding"] else clipped_step,
        stochastic=True,
    )


def ddim_columns(there: np.ndarray, sigma: np.ndarray) -> dict[str, np.ndarray]:
    """Weights of a step to alphas_cumprod `there` with noise of standard deviation `sigma`, each (calls,)."""
    return {"x0": np.sqrt(there), "eps": np.sqrt(np.maximum(1 - there - sigma**2, 0)), "noise": sigma}


def no_state(x: jax.Array) -> tuple[()]:
    """DDIM remembers nothing."""
    return ()


def clipped_step(
    prediction_type: str, state: tuple[()], x: jax.Array, out: jax.Array, row: Row, noise: jax.Array | None
) -> tuple[jax.Array, tuple[()]]:
    """One DDIM step with x0 clamped to +-row["clip"], which may be infinite. See `Solver.step`."""
    x0, eps = to_x0_eps(prediction_type, out, x, row["alpha_cumprod"])
    return _move(jnp.clip(x0, -row["clip"], row["clip"]), eps, row, noise), state


def thresholded_step(
    prediction_type: str, state: tuple[()], x: jax.Array, out: jax.Array, row: Row, noise: jax.Array | None
) -> tuple[jax.Array, tuple[()]]:
    """One DDIM step with x0 dynamically thresholded. See `Solver.step`."""
    x0, eps = to_x0_eps(prediction_type, out, x, row["alpha_cumprod"])
    return _move(threshold(x0, row), eps, row, noise), state


def _move(x0: jax.Array, eps: jax.Array, row: Row, noise: jax.Array | None) -> jax.Array:
    if noise is None:
        raise ValueError("noise is None; a DDIM step takes noise (zeros where eta is 0)")
    return row["x0"] * x0 + row["eps"] * eps + row["noise"] * noise
