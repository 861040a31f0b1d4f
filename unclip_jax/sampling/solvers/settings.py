"""Reading a diffusers `scheduler_config.json` the way diffusers does.

For a scheduler's own file, the keys that it has count, and missing ones take the class's default. For a scheduler that
replaces another, see `swapped`. Keys that the class does not have are ignored. Settings that we do not support are
refused by name.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from unclip_jax.sampling.schedule import BETA_SCHEDULES, PREDICTION_TYPES, NoiseSchedule

SCHEDULE_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
THRESHOLDING_DEFAULTS: dict[str, Any] = {
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}
# diffusers' mark in the settings of a scheduler: the keys whose values are not the file's, but the class's default, or
# what a pipeline has put there since.
DEFAULTED = "_use_default_values"
LARGEST_INTEGER = 1_000_000  # keeps a broken file from filling the memory with tables
CHOICES: dict[str, tuple[Any, ...]] = {
    "beta_schedule": BETA_SCHEDULES,
    "prediction_type": PREDICTION_TYPES,
    "timestep_spacing": ("leading", "linspace", "trailing"),
}


def read_settings(
    config: Mapping[str, Any], defaults: Mapping[str, Any], choices: Mapping[str, Sequence[Any]] | None = None
) -> dict[str, Any]:
    """The values of the keys in `defaults`, each from `config` or else the default.

    Args:
        config: The contents of a scheduler_config.json.
        defaults: The keys to read with the class's defaults. A value must have its default's type (an integer passes
            for a float).
        choices: The accepted values of some keys, in addition to `CHOICES`.

    Returns:
        The settings.

    Raises:
        ValueError: A value has the wrong type or is not accepted. The message names the key.
    """
    choices = {**CHOICES, **(choices or {})}
    settings = {}
    for key, default in defaults.items():
        value = config.get(key, default)
        if key in choices:
            if value not in choices[key]:
                raise ValueError(
                    f"scheduler config: {key} is {value!r:.80}; accepted: {', '.join(map(repr, choices[key]))}"
                )
        elif isinstance(default, bool):
            if not isinstance(value, bool):
                raise ValueError(f"scheduler config: {key} is {value!r:.80}; want true or false")
        elif isinstance(default, int):
            if not isinstance(value, Integral) or isinstance(value, bool) or abs(int(value)) > LARGEST_INTEGER:
                raise ValueError(f"scheduler config: {key} is {value!r:.80}; want an integer")
        elif isinstance(default, float) and not _is_number(value):
            raise ValueError(f"scheduler config: {key} is {value!r:.80}; want a number")
        settings[key] = value
    return settings


def given(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` without the keys that `DEFAULTED` lists, and without that key."""
    defaulted = config.get(DEFAULTED)
    left_out = [DEFAULTED, *(defaulted if isinstance(defaulted, list | tuple) else ())]
    return {key: value for key, value in config.items() if key not in left_out}


def swapped(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings for a scheduler that takes the place of the one that `config` describes.

    They are what `from_config` reads from the other's file, except that x0 is not limited: latents reach far beyond
    -1..1, while the file's `clip_sample` and `thresholding`, or the class's defaults for them, are meant for images.
    """
    return {**given(config), "clip_sample": False, "thresholding": False}


def noise_schedule(settings: Mapping[str, Any]) -> NoiseSchedule:
    """The noise schedule in settings read with `SCHEDULE_DEFAULTS`.

    Raises:
        ValueError: A value is out of range.
    """
    betas = settings["trained_betas"]
    if betas is not None:
        try:
            betas = tuple(float(beta) for beta in betas)
        except (TypeError, ValueError, OverflowError):
            raise ValueError("scheduler config: trained_betas is not a list of numbers") from None
    return NoiseSchedule(
        num_train_timesteps=int(settings["num_train_timesteps"]),
        beta_start=settings["beta_start"],
        beta_end=settings["beta_end"],
        beta_schedule=settings["beta_schedule"],
        trained_betas=betas,
        rescale_betas_zero_snr=settings.get("rescale_betas_zero_snr", False),
    )


def check_steps(num_inference_steps: int, most: int, least: int = 1, solver: str = "") -> int:
    """Checks `num_inference_steps`, an integer from `least` to `most`, and returns it as an int.

    Args:
        num_inference_steps: What was given.
        most: The largest accepted number.
        least: The smallest.
        solver: What needs more than one step, for the message.

    Raises:
        ValueError: It is not such an integer.
    """
    if not isinstance(num_inference_steps, Integral) or isinstance(num_inference_steps, bool):
        raise ValueError(f"num_inference_steps is {num_inference_steps!r:.80}; want an integer")
    if not least <= num_inference_steps <= most:
        reason = f" for {solver}" if solver else ""
        raise ValueError(f"num_inference_steps is {num_inference_steps}; want {least} to {most}{reason}")
    return int(num_inference_steps)


def check_start_step(start_step: int, steps: int) -> int:
    """Checks `start_step`, the number of `steps` to leave out, and returns it as an int.

    Raises:
        ValueError: It is not an integer that leaves at least one step.
    """
    if not isinstance(start_step, Integral) or isinstance(start_step, bool) or not 0 <= start_step < steps:
        raise ValueError(
            f"start_step is {start_step!r:.80}; want an integer from 0 to {steps - 1}: one step of {steps} must be left"
        )
    return int(start_step)


def check_eta(eta: float) -> float:
    """Checks `eta`, a number from 0 to 1, and returns it as a float.

    Raises:
        ValueError: It is not such a number.
    """
    if not isinstance(eta, Real) or isinstance(eta, bool) or not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta!r:.80}; want a number from 0 to 1")
    return float(eta)


def check_timesteps(timesteps: np.ndarray, settings: Mapping[str, Any], num_inference_steps: int) -> np.ndarray:
    """Returns `timesteps` as they are.

    Raises:
        ValueError: A timestep is outside the schedule, where an offset may push it.
    """
    last = settings["num_train_timesteps"] - 1
    outside = timesteps[(timesteps < 0) | (timesteps > last)]
    if outside.size:
        raise ValueError(
            f"num_inference_steps={num_inference_steps} with timestep_spacing {settings['timestep_spacing']!r} and "
            f"steps_offset {settings['steps_offset']} needs timestep {outside[0]}; the schedule has 0 to {last}"
        )
    return timesteps


def spaced_timesteps(settings: Mapping[str, Any], num_inference_steps: int) -> np.ndarray:
    """The timesteps of DDIM and PNDM, falling: (num_inference_steps,) int64.

    The spacings are those of Lin et al. 2023 (arXiv:2305.08891), table 2.

    Raises:
        ValueError: The offset pushes a timestep out of the schedule.
    """
    count, train = num_inference_steps, settings["num_train_timesteps"]
    if settings["timestep_spacing"] == "leading":
        rising = np.arange(count) * (train // count) + settings["steps_offset"]
    elif settings["timestep_spacing"] == "linspace":
        rising = np.linspace(0, train - 1, count).round()
    else:
        rising = trailing_timesteps(train, train, count)[::-1]
    return check_timesteps(rising[::-1].astype(np.int64), settings, count)


def trailing_timesteps(last: int, train: int, count: int) -> np.ndarray:
    """`count` timesteps or fewer from last - 1 down in strides of train / count, (count,) int64.

    For some counts (61 of 1000 is the first) rounding lets numpy.arange run one value too far, to timestep -1, where
    diffusers reads the other end of its tables. That value is dropped here.
    """
    return np.arange(last, 0, -train / count)[:count].round().astype(np.int64) - 1


def _is_number(value: Any) -> bool:
    """Whether `value` is a real number that a float can hold, infinities included."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    magnitude: Any = abs(value)
    return magnitude <= sys.float_info.max or magnitude == math.inf
