"""Few steps of distilled models: LCM and TCD, as diffusers' LCMScheduler and TCDScheduler run them.

Luo et al. 2023 (arXiv:2310.04378) and Zheng et al. 2024 (arXiv:2402.19159).
"""

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
)
from unclip_jax.sampling.solvers.solver import Solver, make_grid
from unclip_jax.sampling.solvers.thresholding import limits

TCD = {
    **SCHEDULE_DEFAULTS,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "original_inference_steps": 50,
    "rescale_betas_zero_snr": False,
}
LCM = {**TCD, **THRESHOLDING_DEFAULTS, "clip_sample": False, "clip_sample_range": 1.0, "timestep_scaling": 10.0}
SIGMA_DATA = 0.5


def lcm(config: Mapping[str, Any], num_inference_steps: int, start_step: int = 0) -> Solver:
    """Multistep consistency sampling: x0 is predicted and noised again to the next level.

    Args:
        config: A diffusers scheduler_config.json (LCMScheduler).
        num_inference_steps: Network evaluations, 1 to original_inference_steps (50). Their timesteps are a subset of
            those.
        start_step: The number of steps to leave out.

    Returns:
        The solver; it is stochastic.

    Raises:
        ValueError: A setting or a number is out of range.
    """
    settings = read_settings(config, LCM)
    timesteps, table = _timesteps(settings, num_inference_steps, "lcm")
    there = np.append(table[timesteps[1:]], np.float32(1)).astype(np.float64)
    # The consistency function's weights of x and of the network's x0.
    scaled = timesteps * float(settings["timestep_scaling"])
    skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
    out = scaled / np.sqrt(scaled**2 + SIGMA_DATA**2)
    grid = make_grid(
        timesteps,
        table[timesteps],
        check_start_step(start_step, len(timesteps)),
        x=np.sqrt(there) * skip,
        x0=np.sqrt(there) * out,
        noise=np.sqrt(1 - there),
        **limits(settings),
    )
    return linear.table(grid, settings["prediction_type"], stochastic=True)


def tcd(config: Mapping[str, Any], num_inference_steps: int, eta: float = 0.0, start_step: int = 0) -> Solver:
    """Trajectory consistency sampling: a DDIM step to below the next noise level, then noise up to it.

    Args:
        config: A diffusers scheduler_config.json (TCDScheduler).
        num_inference_steps: As in `lcm`.
        eta: The paper's gamma, from 0 (a step to the next level itself, without noise) to 1 (a step to the clean end,
            each time).
        start_step: As in `lcm`.

    Returns:
        The solver; it is stochastic.

    Raises:
        ValueError: A setting or a number is out of range.
    """
    settings = read_settings(config, TCD)
    timesteps, table = _timesteps(settings, num_inference_steps, "tcd")
    target = np.append(timesteps[1:], 0)
    below = np.floor(np.float32(1 - check_eta(eta)) * target.astype(np.float32)).astype(np.int64)
    there, under = table[target].astype(np.float64), table[below].astype(np.float64)
    grid = make_grid(
        timesteps,
        table[timesteps],
        check_start_step(start_step, len(timesteps)),
        x0=np.sqrt(there),
        eps=np.sqrt(there / under * (1 - under)),
        noise=np.sqrt(1 - there / under),
    )
    return linear.table(grid, settings["prediction_type"], stochastic=True)


def _timesteps(settings: Mapping[str, Any], num_inference_steps: int, solver: str) -> tuple[np.ndarray, np.ndarray]:
    """The timesteps, falling, chosen from those of the distillation, and alphas_cumprod."""
    table = alphas_cumprod(noise_schedule(settings))
    most = settings["original_inference_steps"]
    if not 1 <= most <= len(table):
        raise ValueError(f"scheduler config: original_inference_steps is {most}; want 1 to {len(table)}")
    count = check_steps(num_inference_steps, most, solver=f"{solver!r}, whose original_inference_steps is {most}")
    learned = np.arange(most, 0, -1) * (len(table) // most) - 1
    timesteps = learned[np.linspace(0, most, count, endpoint=False).astype(np.int64)]
    if settings["prediction_type"] == "epsilon" and not table[timesteps].all():
        raise ValueError("scheduler config: prediction_type 'epsilon' cannot start from a zero signal-to-noise ratio")
    return timesteps, table
