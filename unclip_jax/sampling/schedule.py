"""Noise schedules: how much signal is left at each training timestep, and what a prediction implies about it.

Written with a = alphas_cumprod[t]: x_t = sqrt(a) x_0 + sqrt(1 - a) eps (DDPM, Ho et al. 2020, arXiv:2006.11239).
"""

import dataclasses
import itertools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.reference import Reference

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
BETA_SCHEDULES: tuple[BetaSchedule, ...] = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """The betas that a model was trained with, under diffusers' names and defaults.

    Args:
        num_train_timesteps: N, 2 to a million (a broken file must not fill the memory).
        beta_start: 0 < beta_start <= beta_end; not read by "squaredcos_cap_v2".
        beta_end: beta_end < 1; not read by "squaredcos_cap_v2".
        beta_schedule: "linear"; "scaled_linear", linear in sqrt(beta), which the original repository calls "linear"; or
            "squaredcos_cap_v2", the cosine schedule (Nichol & Dhariwal 2021, arXiv:2102.09672) with betas of at most
            0.999.
        trained_betas: N values in (0, 1), of which the last may be 1. They replace all of the above.
        rescale_betas_zero_snr: Shifts sqrt(alphas_cumprod) so that it ends in 0 (Lin et al. 2023, arXiv:2305.08891).

    Raises:
        ValueError: A value is outside these ranges.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: BetaSchedule = "linear"
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.num_train_timesteps <= 1_000_000:
            raise ValueError(f"num_train_timesteps is {self.num_train_timesteps!r}; want 2 to 1000000")
        if self.beta_schedule not in BETA_SCHEDULES:
            raise ValueError(f"beta_schedule is {self.beta_schedule!r}; accepted: {', '.join(BETA_SCHEDULES)}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start is {self.beta_start!r} and beta_end {self.beta_end!r}; want 0 < beta_start <= beta_end < 1"
            )
        if self.trained_betas is not None:
            if len(self.trained_betas) != self.num_train_timesteps:
                raise ValueError(
                    f"trained_betas has {len(self.trained_betas)} values; num_train_timesteps is "
                    f"{self.num_train_timesteps}"
                )
            if not all(0 < beta < 1 for beta in self.trained_betas[:-1]) or not 0 < self.trained_betas[-1] <= 1:
                raise ValueError("trained_betas has values outside (0, 1); only the last may be 1")


def alphas_cumprod(schedule: NoiseSchedule, reference: Reference = Reference.DIFFUSERS) -> np.ndarray:
    """The signal's share of the variance at each training timestep: (N,) float32, falling within (0, 1).

    Only the last value may be 0, with `rescale_betas_zero_snr` or a last beta of 1.

    Args:
        schedule: The betas.
        reference: Whose rounding to reproduce; each equals its reference bit for bit. "original", the original
            repository: float64 throughout, rounded once at the end. "diffusers": float32 as torch computes it on a CPU.
            The two differ by up to 1e-6 relative for the Stable Diffusion 2 betas and by 1e-5 at the end of the cosine
            schedule. (A rescaled schedule follows diffusers within 1e-6 only: torch's square root rounds differently
            from machine to machine.)

    Returns:
        (N,) float32 numpy array.

    Raises:
        ValueError: The betas are so small or so large that a value is not distinct from 0 or 1 in float32.
    """
    table = _float64_table(schedule).astype(np.float32) if reference == Reference.ORIGINAL else _torch_table(schedule)
    if not (table < 1).all() or not (table[:-1] > 0).all():
        raise ValueError("noise schedule: the betas are too small or too large for float32")
    return table


def cosine_betas(count: int) -> np.ndarray:
    """The betas of "squaredcos_cap_v2", as both references compute them: (count,) float64."""
    # In Python floats, as both references compute them: numpy's vectorised cosine may round differently.
    share = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
    return np.array([min(1 - after / before, 0.999) for before, after in itertools.pairwise(share)])


def _float64_table(schedule: NoiseSchedule) -> np.ndarray:
    if schedule.trained_betas is not None:
        betas = np.array(schedule.trained_betas, np.float64)
    elif schedule.beta_schedule == "squaredcos_cap_v2":
        betas = cosine_betas(schedule.num_train_timesteps)
    elif schedule.beta_schedule == "scaled_linear":
        betas = torch_linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, schedule.num_train_timesteps) ** 2
    else:
        betas = torch_linspace(schedule.beta_start, schedule.beta_end, schedule.num_train_timesteps)
    table = np.cumprod(1 - betas)
    if schedule.rescale_betas_zero_snr:
        root = np.sqrt(table)
        table = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return table


def _torch_table(schedule: NoiseSchedule) -> np.ndarray:
    one = np.float32(1)
    if schedule.trained_betas is not None:
        betas = np.array(schedule.trained_betas, np.float32)
    elif schedule.beta_schedule == "squaredcos_cap_v2":
        betas = cosine_betas(schedule.num_train_timesteps).astype(np.float32)
    elif schedule.beta_schedule == "scaled_linear":
        start, end = schedule.beta_start**0.5, schedule.beta_end**0.5
        betas = torch_linspace(start, end, schedule.num_train_timesteps, np.float32) ** 2
    else:
        betas = torch_linspace(schedule.beta_start, schedule.beta_end, schedule.num_train_timesteps, np.float32)
    table = _torch_cumprod(one - betas)
    if schedule.rescale_betas_zero_snr:
        root = np.sqrt(table)
        table = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        # diffusers goes back to betas and multiplies them up again, which rounds everything once more.
        betas = one - np.concatenate([table[:1], table[1:] / table[:-1]])
        table = _torch_cumprod(one - betas)
    return table


def torch_linspace(start: float, end: float, count: int, dtype: type[np.floating] = np.float64) -> np.ndarray:
    """torch.linspace on a CPU, reproduced bit for bit in float32.

    The second half is counted back from the end. Each value is one fused multiply-add: computed without rounding (in
    float32: in float64) and rounded once. numpy.linspace does neither.

    Args:
        start: The first value.
        end: The last value.
        count: The number of values, at least 2.
        dtype: numpy's float32 or float64.

    Returns:
        (count,) of `dtype`.
    """
    first, last = dtype(start), dtype(end)
    step = np.float64((last - first) / dtype(count - 1))
    index = np.arange(count)
    rising, falling = np.float64(first) + step * index, np.float64(last) - step * (count - 1 - index)
    return np.where(index < count // 2, rising, falling).astype(dtype)


def _torch_cumprod(values: np.ndarray) -> np.ndarray:
    # torch accumulates float32 products in float64 and rounds each one it writes.
    return np.cumprod(values, dtype=np.float64).astype(np.float32)


def add_noise(x0: jax.Array, noise: jax.Array, alpha_cumprod: jax.Array | np.ndarray) -> jax.Array:
    """Moves clean data to a noise level: sqrt(a) x0 + sqrt(1 - a) noise.

    Args:
        x0: (B, ...), clean data.
        noise: (B, ...), standard normal.
        alpha_cumprod: a, () or (B,).

    Returns:
        (B, ...) float32.
    """
    alpha, sigma = _signal_and_noise(alpha_cumprod, x0.ndim)
    return alpha * x0.astype(jnp.float32) + sigma * noise.astype(jnp.float32)


def to_x0_eps(
    prediction_type: str, out: jax.Array, x: jax.Array, alpha_cumprod: jax.Array | np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """Converts a network's prediction into the clean data x0 and the noise eps that it implies.

    Args:
        prediction_type: "epsilon", the noise; "v_prediction", sqrt(a) eps - sqrt(1 - a) x0 (Salimans & Ho 2022,
            arXiv:2202.00512); or "sample", the clean data.
        out: (B, ...), the prediction.
        x: (B, ...), the noisy data that it was made from.
        alpha_cumprod: a, () or (B,).

    Returns:
        x0 and eps, (B, ...) float32 each. With a = 0 an "epsilon" prediction does not determine x0, which is then not
        finite.

    Raises:
        ValueError: The prediction type is unknown.
    """
    out, x = out.astype(jnp.float32), x.astype(jnp.float32)
    alpha, sigma = _signal_and_noise(alpha_cumprod, x.ndim)
    if prediction_type == "epsilon":
        return (x - sigma * out) / alpha, out
    if prediction_type == "v_prediction":
        return alpha * x - sigma * out, alpha * out + sigma * x
    if prediction_type == "sample":
        return out, (x - alpha * out) / sigma
    raise ValueError(f"prediction_type is {prediction_type!r}; accepted: {', '.join(PREDICTION_TYPES)}")


def _signal_and_noise(alpha_cumprod: jax.Array | np.ndarray, ndim: int) -> tuple[jax.Array, jax.Array]:
    share = jnp.asarray(alpha_cumprod, jnp.float32)
    share = share.reshape(share.shape + (1,) * (ndim - share.ndim if share.ndim else 0))
    return jnp.sqrt(share), jnp.sqrt(1 - share)
