"""Noise levels of the solvers of Karras et al. 2022 (arXiv:2206.00364), as diffusers spaces them.

There x is the image plus sigma times noise. Here it is that divided by sqrt(sigma^2 + 1), as the network sees it.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from unclip_jax.sampling.schedule import alphas_cumprod
from unclip_jax.sampling.solvers.settings import SCHEDULE_DEFAULTS, check_steps, check_timesteps, noise_schedule

Spacing = Literal["karras", "exponential", "beta", "lu"]
SPACINGS: tuple[Spacing, ...] = ("karras", "exponential", "beta")
DEFAULTS: dict[str, Any] = {**SCHEDULE_DEFAULTS, "timestep_spacing": "linspace", "steps_offset": 0}
# Classes written after k-diffusion's begin with Stable Diffusion's betas.
K_DIFFUSION_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}


class NoiseLevels(NamedTuple):
    """Steps from one noise level to the next.

    Attributes:
        timesteps: (steps,), of each step's start; fractional.
        sigmas: (steps + 1,) float64, falling.
        every_log_sigma: log(sigma) of all training timesteps.
        scale: Of the initial noise; with "linspace" and "trailing" it does not include the image's share.
    """

    timesteps: np.ndarray
    sigmas: np.ndarray
    every_log_sigma: np.ndarray
    scale: np.float32

    @property
    def alphas(self) -> np.ndarray:
        """The signal's factor in x at each level, (steps + 1,); at the last level it is 1, whatever noise is left."""
        return np.append(alpha_of(self.sigmas[:-1]), 1.0)

    def timestep_of(self, sigmas: np.ndarray) -> np.ndarray:
        """The fractional timesteps of noise levels above 0."""
        return np.interp(np.log(sigmas), self.every_log_sigma, np.arange(len(self.every_log_sigma)))


def alpha_of(sigma: np.ndarray) -> np.ndarray:
    """The signal's factor in x at noise level sigma."""
    return 1 / np.sqrt(sigma**2 + 1)


def noise_levels(settings: Mapping[str, Any], num_inference_steps: int, spacing: Spacing | None) -> NoiseLevels:
    """The noise levels of `num_inference_steps` steps, 1 to the number of training timesteps.

    Args:
        settings: Read with `DEFAULTS`.
        num_inference_steps: The number of steps.
        spacing: How to space them between the first and the last noise level that `timestep_spacing` gives: evenly in
            sigma^(1/7) ("karras"), in the logarithm ("exponential"), or by the quantiles of Beta(0.6, 0.6) ("beta",
            arXiv:2407.12173). None keeps those of `timestep_spacing`.

    Returns:
        The levels and timesteps.

    Raises:
        ValueError: A setting or a number is out of range.
    """
    table = alphas_cumprod(noise_schedule(settings))
    if settings.get("rescale_betas_zero_snr"):
        table[-1] = 2**-24  # diffusers' choice: sigma is 4096 there and not infinite
    if not table.all():
        raise ValueError("scheduler config: this solver cannot start from a zero signal-to-noise ratio (trained_betas)")
    train, count = len(table), check_steps(num_inference_steps, len(table))
    timesteps: np.ndarray
    if settings["timestep_spacing"] == "linspace":
        timesteps = np.linspace(0, train - 1, count, dtype=np.float32)[::-1]
    elif settings["timestep_spacing"] == "leading":
        timesteps = np.arange(count)[::-1] * (train // count) + settings["steps_offset"]
    else:
        timesteps = np.arange(train, 0, -train / count)[:count].round() - 1
    timesteps = check_timesteps(timesteps, settings, count).astype(np.float64)
    every = np.sqrt((1 - table) / table)
    every_log = np.log(every)
    sigmas = np.interp(timesteps, np.arange(train), every)
    if spacing is not None:
        sigmas = spaced(float(sigmas[0]), float(sigmas[-1]), count, spacing)
        timesteps = np.interp(np.log(sigmas), every_log, np.arange(train))
    last = every[0] if settings.get("final_sigmas_type") == "sigma_min" else 0
    sigmas = np.append(sigmas, last).astype(np.float32).astype(np.float64)
    first = sigmas.max()
    scale = 1 if settings["timestep_spacing"] == "leading" else first * alpha_of(first)
    return NoiseLevels(timesteps, sigmas, every_log, np.float32(scale))


def spaced(first: float, last: float, count: int, spacing: Spacing) -> np.ndarray:
    """`count` noise levels from first down to last, (count,) float64."""
    share = np.linspace(0, 1, count)
    if spacing == "karras":
        return (first ** (1 / 7) + share * (last ** (1 / 7) - first ** (1 / 7))) ** 7
    if spacing == "exponential":
        return np.exp(np.linspace(np.log(first), np.log(last), count))
    if spacing == "lu":
        # Of logarithms rounded to float32 as diffusers does: the timestep at the start hangs on that.
        logs = np.log(np.array([first, last], np.float32)).astype(np.float64)
        return np.exp(np.linspace(logs[0], logs[1], count))
    import scipy.special  # for this spacing alone

    return last + scipy.special.betaincinv(0.6, 0.6, 1 - share) * (first - last)
