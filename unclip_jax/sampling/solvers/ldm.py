"""The samplers of the original Stable Diffusion 2 repository ("the original"), with its step counts and timesteps."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from unclip_jax.reference import Reference
from unclip_jax.sampling.schedule import NoiseSchedule, alphas_cumprod, torch_linspace
from unclip_jax.sampling.solvers import dpmpp, linear
from unclip_jax.sampling.solvers.ddim import ddim_columns
from unclip_jax.sampling.solvers.pndm import ADAMS
from unclip_jax.sampling.solvers.settings import (
    SCHEDULE_DEFAULTS,
    check_eta,
    check_start_step,
    check_steps,
    noise_schedule,
    read_settings,
)
from unclip_jax.sampling.solvers.solver import Solver, make_grid

DEFAULTS = {**SCHEDULE_DEFAULTS, "rescale_betas_zero_snr": False}
CHOICES = {"prediction_type": ("epsilon", "v_prediction"), "rescale_betas_zero_snr": (False,)}


def ldm_ddim(config: Mapping[str, Any], num_inference_steps: int, eta: float = 0.0, start_step: int = 0) -> Solver:
    """The original's DDIM: timesteps 1, 1 + c, ... below N + 1 with c = N // num_inference_steps, from the highest.

    The last step ends at timestep 0's noise level, not at zero noise. The solver takes noise at every step, as the
    original draws it.

    Args:
        config: A diffusers scheduler_config.json, of which only the betas and prediction_type are read.
        num_inference_steps: Steps. If the number does not divide N there may be more network evaluations than steps (30
            -> 31, 75 -> 77). Counts whose grid would reach timestep N, where the original stops with an index error (3,
            9, 27, 36, 37, 101 to 111, 251 to 333 and 501 to 1000 of 1000), are refused with the nearest accepted ones.
        eta: 0 to 1.
        start_step: The number of evaluations to leave out. As in the original's img2img, the image is then noised to
            the level of the last one left out.

    Returns:
        The solver; it is stochastic.

    Raises:
        ValueError: A setting or a number is out of range.
    """
    settings = read_settings(config, DEFAULTS, CHOICES)
    table = alphas_cumprod(noise_schedule(settings), Reference.ORIGINAL)
    eta, timesteps = check_eta(eta), _checked_timesteps(num_inference_steps, len(table), "ldm-ddim")
    start_step = check_start_step(start_step, len(timesteps))
    # float64 arithmetic on the float32 table, as in the original
    here = table[timesteps].astype(np.float64)
    there = table[np.append(timesteps[1:], 0)].astype(np.float64)
    sigma = eta * np.sqrt((1 - there) / (1 - here) * (1 - here / there))
    grid = make_grid(timesteps, here, start_step, **ddim_columns(there, sigma))
    start = here[start_step - 1] if start_step else 0.0
    return _original(linear.table(grid, settings["prediction_type"], stochastic=True, start_alpha_cumprod=start))


def ldm_plms(config: Mapping[str, Any], num_inference_steps: int, start_step: int = 0) -> Solver:
    """The original's PLMS, for models that predict noise: Adams-Bashforth over noises on the grid of `ldm_ddim`.

    The first step takes two network evaluations: one more in all than "ldm-ddim" has. Three noises are remembered.

    Args:
        config: A diffusers scheduler_config.json, of which only the betas and prediction_type are read. A v-prediction
            model is refused: the original would take its output for noise.
        num_inference_steps: The same counts as in `ldm_ddim`.
        start_step: Must be 0: the original cannot start part-way.

    Returns:
        The solver; it is deterministic.

    Raises:
        ValueError: A setting or a number is out of range.
    """
    if config.get("prediction_type") == "v_prediction":
        raise ValueError("'ldm-plms' works with models that predict epsilon only; this one has 'v_prediction'")
    settings = read_settings(config, DEFAULTS, {**CHOICES, "prediction_type": ("epsilon",)})
    _refuse_start_step(start_step, "ldm-plms")
    table = alphas_cumprod(noise_schedule(settings), Reference.ORIGINAL)
    timesteps = _checked_timesteps(num_inference_steps, len(table), "ldm-plms")
    here = table[timesteps].astype(np.float64)
    there = table[np.append(timesteps[1:], 0)].astype(np.float64)
    # A DDIM step as weights of x and of the noise.
    x = np.sqrt(there / here)
    eps = np.sqrt(1 - there) - x * np.sqrt(1 - here)
    orders = np.minimum(np.arange(len(timesteps)) + 1, 4)
    noises = np.array([ADAMS[order] for order in orders]) * eps[:, None]
    # The second call corrects the first step by half the difference of the noises at its two ends, and keeps the older.
    second = timesteps[1:2] if len(timesteps) > 1 else timesteps
    timesteps, level = np.insert(timesteps, 1, second), np.insert(here, 1, table[second])
    noises = np.insert(noises, 1, [eps[0] / 2, -eps[0] / 2, 0, 0], axis=0)
    keep_old = np.arange(len(timesteps)) == 1
    grid = make_grid(
        timesteps,
        level,
        x=np.insert(x, 1, 1),
        **dict(zip(("eps", "memory", "memory_2", "memory_3"), noises.T, strict=True)),
        keep_eps=~keep_old,
        keep_memory=keep_old,
    )
    return _original(linear.table(grid, settings["prediction_type"], remembers=3))


def _original(solver: Solver) -> Solver:
    return dataclasses.replace(solver, reference=Reference.ORIGINAL)


def _refuse_start_step(start_step: int, solver: str) -> None:
    if start_step != 0:
        raise ValueError(
            f"start_step is {start_step!r:.80}; {solver!r} has no start part-way: want 0, or the solver 'ldm-ddim'"
        )


def _checked_timesteps(num_inference_steps: int, train: int, solver: str) -> np.ndarray:
    count = check_steps(num_inference_steps, train)
    timesteps = _ddim_timesteps(count, train)
    if timesteps[0] >= train:
        raise ValueError(
            f"num_inference_steps={count} does not work with {solver!r} (its timesteps would reach {timesteps[0]} of 0 "
            f"to {train - 1}); nearest accepted: {_nearest_counts(count, train)}"
        )
    return timesteps


def _ddim_timesteps(count: int, train: int) -> np.ndarray:
    return np.arange(0, train, train // count)[::-1] + 1


def _nearest_counts(count: int, train: int) -> str:
    lower = (n for n in range(count - 1, 0, -1) if _ddim_timesteps(n, train)[0] < train)
    higher = (n for n in range(count + 1, train + 1) if _ddim_timesteps(n, train)[0] < train)
    return ", ".join(str(n) for n in (next(lower, None), next(higher, None)) if n is not None)


def ldm_dpm(config: Mapping[str, Any], num_inference_steps: int, start_step: int = 0) -> Solver:
    """The original's DPM-Solver++ (2M): `num_inference_steps` network evaluations, 2 to N, at fractional timesteps.

    Times are spaced evenly from 1 to 1 / N, where sampling ends without a last denoising step. The noise level between
    training timesteps is interpolated linearly in log(alpha). Steps are of second order except the first, and except
    the last when there are fewer than 15. One prediction is remembered.

    Args:
        config: A diffusers scheduler_config.json, of which only the betas and prediction_type are read.
        num_inference_steps: Network evaluations, 2 to N.
        start_step: Must be 0: the original cannot start part-way.

    Returns:
        The solver; it is deterministic.

    Raises:
        ValueError: A setting or a number is out of range.
    """
    settings = read_settings(config, DEFAULTS, CHOICES)
    _refuse_start_step(start_step, "ldm-dpm")
    schedule = noise_schedule(settings)
    count = check_steps(num_inference_steps, schedule.num_train_timesteps, least=2, solver="'ldm-dpm'")
    times, log_alpha = continuous_grid(schedule, count)
    sigma = np.sqrt(-np.expm1(2 * log_alpha))
    orders = np.full(count, 2)
    orders[0] = 1
    if count < 15:
        orders[-1] = 1
    # The network is given (t - 1 / N) * 1000, in float32.
    timesteps = (times - np.float32(1 / schedule.num_train_timesteps)) * np.float32(1000)
    columns = dpmpp.multistep_columns(np.exp(log_alpha), sigma, orders, most=2)
    grid = make_grid(timesteps[:-1], np.exp(2 * log_alpha[:-1]), **columns)
    return _original(linear.table(grid, settings["prediction_type"], remembers=1))


def continuous_grid(schedule: NoiseSchedule, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Times from 1 to 1 / N, float32, and log(alpha) at each of them, float64: (count + 1,) each."""
    train = schedule.num_train_timesteps
    times = torch_linspace(1, 1 / train, count + 1, np.float32)
    log_alphas = 0.5 * np.log(alphas_cumprod(schedule, Reference.ORIGINAL).astype(np.float64))
    return times, np.interp(times, torch_linspace(0, 1, train + 1, np.float32)[1:], log_alphas)
