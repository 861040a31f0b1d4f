"""Solvers by name."""

import difflib
import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

from unclip_jax.sampling.solvers.ddim import ddim
from unclip_jax.sampling.solvers.ddpm import ddpm
from unclip_jax.sampling.solvers.dpmpp import dpmpp_2m
from unclip_jax.sampling.solvers.euler import euler, euler_ancestral
from unclip_jax.sampling.solvers.ldm import ldm_ddim, ldm_dpm
from unclip_jax.sampling.solvers.lms import lms
from unclip_jax.sampling.solvers.pndm import pndm
from unclip_jax.sampling.solvers.settings import check_eta
from unclip_jax.sampling.solvers.sigmas import SPACINGS, Spacing
from unclip_jax.sampling.solvers.solver import Solver
from unclip_jax.sampling.solvers.two_calls import dpm2, heun

# What stabilityai/stable-diffusion-2-1-unclip publishes; original files behave like it under diffusers' solver names.
PUBLISHED_UNCLIP_SCHEDULER: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
    "trained_betas": None,
}

_BUILDERS: dict[str, Callable[[Mapping[str, Any], int, float], Solver]] = {
    "ddim": ddim,
    "ddpm": lambda config, steps, eta: ddpm(config, steps),
    "pndm": lambda config, steps, eta: pndm(config, steps),
    "dpm++2m": lambda config, steps, eta: dpmpp_2m(config, steps),
    "dpm++2m-karras": lambda config, steps, eta: dpmpp_2m(config, steps, karras=True),
    "euler": lambda config, steps, eta: euler(config, steps),
    "euler-ancestral": lambda config, steps, eta: euler_ancestral(config, steps),
    "heun": lambda config, steps, eta: heun(config, steps),
    "lms": lambda config, steps, eta: lms(config, steps),
    "dpm2": lambda config, steps, eta: dpm2(config, steps),
    "dpm2-ancestral": lambda config, steps, eta: dpm2(config, steps, ancestral_steps=True),
    "ldm-ddim": ldm_ddim,
    "ldm-dpm": lambda config, steps, eta: ldm_dpm(config, steps),
}
_SPACED: dict[str, Callable[[Mapping[str, Any], int, Spacing], Solver]] = {
    "euler": euler,
    "heun": heun,
    "lms": lms,
    "dpm2": dpm2,
    "dpm2-ancestral": functools.partial(dpm2, ancestral_steps=True),
}
SCHEDULERS = (*_BUILDERS, *(f"{name}-{spacing}" for name in _SPACED for spacing in SPACINGS))

_CLASSES = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "PNDMScheduler": "pndm",
    "DPMSolverMultistepScheduler": "dpm++2m",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-ancestral",
    "HeunDiscreteScheduler": "heun",
    "LMSDiscreteScheduler": "lms",
    "KDPM2DiscreteScheduler": "dpm2",
    "KDPM2AncestralDiscreteScheduler": "dpm2-ancestral",
}


def make_solver(name: str, config: Mapping[str, Any], num_inference_steps: int, eta: float = 0.0) -> Solver:
    """The solver called `name` for a model with the diffusers scheduler_config.json `config`.

    name: one of `SCHEDULERS`. "ldm-*" are the original repository's procedures, which read only the betas and
    prediction_type; the others are diffusers', which read `config` as `from_config` does: its keys win, absent keys
    take the class's own default, keys of other classes are ignored. A last part "karras", "exponential" or "beta"
    spaces the noise levels so; without it they are as `timestep_spacing` says, whatever `use_karras_sigmas` and the
    like are. num_inference_steps: 1 to the number of training timesteps. eta: 0 to 1, read by "ddim" and "ldm-ddim"
    and, as in diffusers, ignored by the others.

    Raises ValueError, before anything is computed, for what is unknown, out of range or not supported.
    """
    if name not in SCHEDULERS:
        close = difflib.get_close_matches(str(name).lower(), SCHEDULERS, n=1, cutoff=0.4)
        advice = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown scheduler {name!r}; {advice}accepted: {', '.join(SCHEDULERS)}")
    eta = check_eta(eta)
    if name in _BUILDERS:
        return _BUILDERS[name](config, num_inference_steps, eta)
    name, _, spacing = name.rpartition("-")
    return _SPACED[name](config, num_inference_steps, cast(Spacing, spacing))


def scheduler_name(config: Mapping[str, Any]) -> str:
    """Our name for the scheduler that a diffusers scheduler_config.json describes, by its `_class_name`.

    Raises ValueError for a class that we do not have.
    """
    kind = config.get("_class_name")
    if not isinstance(kind, str) or kind not in _CLASSES:
        raise ValueError(f"unsupported scheduler _class_name {kind!r}; accepted: {', '.join(_CLASSES)}")
    spacing = next((spacing for spacing in SPACINGS if config.get(f"use_{spacing}_sigmas")), None)
    spaced = f"{_CLASSES[kind]}-{spacing}"
    return spaced if spaced in SCHEDULERS else _CLASSES[kind]
