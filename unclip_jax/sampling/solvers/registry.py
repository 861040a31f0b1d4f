"""Solvers by name, and the start of a run that begins with an image."""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Collection, Mapping
from numbers import Real
from typing import Any

import jax
import numpy as np

from unclip_jax.sampling.solvers import aliases
from unclip_jax.sampling.solvers.consistency import lcm, tcd
from unclip_jax.sampling.solvers.ddim import ddim
from unclip_jax.sampling.solvers.ddpm import ddpm
from unclip_jax.sampling.solvers.deis import deis
from unclip_jax.sampling.solvers.dpmpp import dpmpp_2m, dpmpp_2s
from unclip_jax.sampling.solvers.euler import euler, euler_ancestral
from unclip_jax.sampling.solvers.ldm import ldm_ddim, ldm_dpm, ldm_plms
from unclip_jax.sampling.solvers.lms import lms
from unclip_jax.sampling.solvers.pndm import pndm
from unclip_jax.sampling.solvers.second_order import dpm2, heun
from unclip_jax.sampling.solvers.settings import check_eta, check_steps, swapped
from unclip_jax.sampling.solvers.sigmas import SPACINGS
from unclip_jax.sampling.solvers.solver import Recipe, Solver
from unclip_jax.sampling.solvers.unipc import unipc

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

_BUILDERS: dict[str, Callable[..., Solver]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "pndm": pndm,
    "dpm++2m": dpmpp_2m,
    "dpm++2m-sde": functools.partial(dpmpp_2m, sde=True),
    "dpm++2s": dpmpp_2s,
    "unipc": unipc,
    "deis": deis,
    "euler": euler,
    "euler-a": euler_ancestral,
    "heun": heun,
    "lms": lms,
    "dpm2": dpm2,
    "dpm2-a": functools.partial(dpm2, ancestral_steps=True),
    "lcm": lcm,
    "tcd": tcd,
    "ldm-ddim": ldm_ddim,
    "ldm-dpm": ldm_dpm,
    "ldm-plms": ldm_plms,
}
_TAKE_ETA = ("ddim", "tcd", "ldm-ddim")
# The last parts that each name may have: what diffusers' class has a `use_..._sigmas` for, and trailing timesteps.
SGM_UNIFORM = "sgm-uniform"
_SPACED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("dpm++2m", "dpm++2m-sde"), (*SPACINGS, "lu", SGM_UNIFORM)),
    "dpm++2s": SPACINGS,
    **dict.fromkeys(("unipc", "deis", "euler", "heun", "lms", "dpm2", "dpm2-a"), (*SPACINGS, SGM_UNIFORM)),
    "euler-a": (SGM_UNIFORM,),
}
_NAMES: dict[str, tuple[str, str | None]] = {
    **{name: (name, None) for name in _BUILDERS},
    **{f"{name}-{spacing}": (name, spacing) for name, spacings in _SPACED.items() for spacing in spacings},
}
SCHEDULERS = tuple(_NAMES)

_CLASSES = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "PNDMScheduler": "pndm",
    "DPMSolverMultistepScheduler": "dpm++2m",
    "DPMSolverSinglestepScheduler": "dpm++2s",
    "UniPCMultistepScheduler": "unipc",
    "DEISMultistepScheduler": "deis",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-a",
    "HeunDiscreteScheduler": "heun",
    "LMSDiscreteScheduler": "lms",
    "KDPM2DiscreteScheduler": "dpm2",
    "KDPM2AncestralDiscreteScheduler": "dpm2-a",
    "LCMScheduler": "lcm",
    "TCDScheduler": "tcd",
}


def make_solver(
    name: str,
    config: Mapping[str, Any],
    num_inference_steps: int,
    eta: float = 0.0,
    start_step: int = 0,
    *,
    own: bool = False,
) -> Solver:
    """The solver called `name` for a model with the diffusers scheduler_config.json `config`.

    Names that begin with "ldm-" are the original repository's procedures, which read only the betas and
    prediction_type. The others are diffusers'. They take the place of the scheduler that `config` describes and read it
    as `from_config` does: what the file says counts, what it omits takes the new class's default, keys of other classes
    are ignored. They never clip or threshold x0, whatever the file says or omits.

    The last part of a name chooses the spacing of the noise levels: "karras", "exponential", "beta", "lu", or
    "sgm-uniform", which is `timestep_spacing` "trailing" under the name of other programs. Without it they are spaced
    as `timestep_spacing` says, whatever `use_karras_sigmas` and similar settings are.

    Args:
        name: One of `SCHEDULERS`.
        config: The contents of a diffusers scheduler_config.json.
        num_inference_steps: 1 to the number of training timesteps ("lcm" and "tcd": to original_inference_steps).
        eta: 0 to 1. Read by "ddim", "tcd" and "ldm-ddim" and, as in diffusers, ignored by the others.
        start_step: The number of steps to leave out at the start, for runs that start from an image (see `first_step`).
            Multistep solvers have no history there. Steps are counted as if none were left out: a step is the same step
            whatever `start_step` is.
        own: The solver is the one that `config` describes; x0 is then limited as the file, or the class's default,
            says.

    Returns:
        The solver.

    Raises:
        ValueError: A name, setting or number is unknown, out of range or not supported. Raised before anything is
            computed.
    """
    base, spacing = _parts(name)
    options: dict[str, Any] = {"start_step": start_step}
    eta = check_eta(eta)
    recipe = Recipe(name, config, num_inference_steps, eta, start_step, own)
    config = config if own else swapped(config)
    if base in _TAKE_ETA:
        options["eta"] = eta
    if spacing == SGM_UNIFORM:
        config = {**config, "timestep_spacing": "trailing"}
    elif spacing:
        options["spacing"] = spacing
    return dataclasses.replace(_BUILDERS[base](config, num_inference_steps, **options), recipe=recipe)


def choose_solver(
    scheduler: str | Solver | None,
    own: str,
    config: Mapping[str, Any],
    num_inference_steps: int,
    eta: float = 0.0,
    strength: float | None = None,
    *,
    depth: bool = False,
    given: Collection[str] = ("num_inference_steps", "eta", "strength"),
) -> Solver:
    """The solver for a pipeline's call.

    Args:
        scheduler: A name of `SCHEDULERS`, a `Solver`, or None for the checkpoint's own.
        own: The name of the checkpoint's own.
        config: The checkpoint's diffusers scheduler_config.json.
        num_inference_steps: As in `make_solver`.
        eta: As in `make_solver`.
        strength: For a run that starts from an image, see `first_step`; None for a run from pure noise. A `Solver` of
            all steps is cut to that share of them.
        depth: As in `first_step`.
        given: Which of the arguments num_inference_steps, eta and strength come from the caller rather than from
            defaults.

    Returns:
        The solver.

    Raises:
        ValueError: As in `make_solver` and `first_step`; or the scheduler has another type, or a `Solver` cannot honour
            an argument.
    """
    if isinstance(scheduler, Solver):
        _refuse_other_settings(scheduler, num_inference_steps, eta, given)
        return scheduler if strength is None else _cut(scheduler, strength, depth, "strength" in given)
    if scheduler is not None and not isinstance(scheduler, str):
        raise ValueError(f"scheduler is {scheduler!r}; want None, a name or a Solver")
    name = own if scheduler is None else scheduler
    train = config.get("num_train_timesteps", 1000)
    start_step = 0 if strength is None else first_step(name, num_inference_steps, strength, train, depth)
    described = scheduler is None and describes(config, name)
    return make_solver(name, config, num_inference_steps, eta, start_step, own=described)


def _refuse_other_settings(solver: Solver, num_inference_steps: int, eta: float, given: Collection[str]) -> None:
    recipe = solver.recipe
    steps = int(solver.steps[-1]) + 1 if recipe is None else recipe.num_inference_steps
    if "num_inference_steps" in given and num_inference_steps != steps:
        raise ValueError(
            f"num_inference_steps is {num_inference_steps}, but scheduler is a Solver of {steps}; want none"
        )
    if "eta" in given and eta != (0 if recipe is None else recipe.eta):
        raise ValueError(f"eta is {eta}, but scheduler is a Solver, which has its own; want none")


def _cut(solver: Solver, strength: float, depth: bool, given: bool) -> Solver:
    """A solver without the first steps, for a run that starts from an image."""
    recipe = solver.recipe
    if recipe is not None and recipe.start_step == 0:
        train = recipe.config.get("num_train_timesteps", 1000)
        start_step = first_step(recipe.name, recipe.num_inference_steps, strength, train, depth)
        again = (recipe.name, recipe.config, recipe.num_inference_steps, recipe.eta, start_step)
        return make_solver(*again, own=recipe.own)
    if recipe is not None:
        if given:
            raise ValueError(
                f"strength is {strength}, but scheduler is a Solver that leaves out {recipe.start_step} steps already; "
                "want a Solver of all steps, or no strength"
            )
        return solver
    steps = int(solver.steps[-1]) + 1
    made = min(int(steps * check_strength(strength)), steps)
    if made == steps:
        return solver
    if made < 1:
        raise ValueError(f"strength is {strength}, which leaves none of the Solver's {steps} steps; want more")
    if jax.tree.leaves(jax.eval_shape(solver.init, jax.ShapeDtypeStruct((1, 1, 1, 1), np.float32))):
        raise ValueError(
            f"strength is {strength}, but scheduler is a Solver of your own that remembers earlier steps; want one of "
            "make_solver, or strength 1"
        )
    kept = solver.steps >= steps - made
    grid = {name: np.asarray(column)[kept] for name, column in solver.grid.items()}
    grid["index"] = np.arange(len(grid["index"]), dtype=np.int32)
    return dataclasses.replace(solver, grid=grid, start_alpha_cumprod=grid["alpha_cumprod"][0])


def check_strength(strength: float) -> float:
    """Checks a strength: a number above 0, at most 1.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(strength, Real) or isinstance(strength, bool) or not 0 < strength <= 1:
        raise ValueError(f"strength is {strength!r:.80}; want a number above 0, to 1")
    return float(strength)


def first_step(name: str, num_inference_steps: int, strength: float, train: int = 1000, depth: bool = False) -> int:
    """The `start_step` of `make_solver` for a run that starts from an image, noised by `strength`.

    diffusers' solvers make the last int(num_inference_steps * strength) steps. "ldm-ddim" makes as many, and noises the
    image to the level before those. At strength 1 that level does not exist, unless `train` is not a multiple of
    num_inference_steps.

    Args:
        name: One of `SCHEDULERS`.
        num_inference_steps: Steps of the whole schedule.
        strength: Above 0, at most 1.
        train: The number of training timesteps.
        depth: Use the rule of the original's depth demo, for "ldm-ddim" only: one step less, and pure noise at strength
            1.

    Returns:
        The number of steps to leave out.

    Raises:
        ValueError: A number is out of range, the strength leaves no step, or the solver is one of the original's that
            cannot start part-way.
    """
    base, _ = _parts(name)
    if base in ("ldm-dpm", "ldm-plms"):
        raise ValueError(f"scheduler {name!r} cannot start from an image in the original; want 'ldm-ddim' or another")
    check_strength(strength)
    count = check_steps(num_inference_steps, train)
    made = min(int(count * strength), count)
    # The original's grid may have more steps than were asked for.
    steps = len(range(0, train, train // count)) if base == "ldm-ddim" else count
    if base == "ldm-ddim" and depth:
        made = min(made, count - 1)
    if made < 1:
        raise ValueError(
            f"strength is {strength} and num_inference_steps {count}, which leaves no step; want a product of 1 or more"
            f"{', and 2 steps or more' if depth else ''}"
        )
    if base == "ldm-ddim" and made == steps:
        raise ValueError(
            f"strength is {strength}; 'ldm-ddim' with {count} steps has no noise level above its first: want less than "
            f"1, {(count - 1) / count:.3g} for one step less"
        )
    return steps - made


def _parts(name: str) -> tuple[str, str | None]:
    """Splits a name into base and spacing.

    Raises:
        ValueError: The name is unknown. The message gives its name here, or the nearest solver.
    """
    if name not in SCHEDULERS:
        advice = aliases.advice(str(name), SCHEDULERS)
        if advice is None:
            close = difflib.get_close_matches(str(name).lower(), SCHEDULERS, n=1, cutoff=0.4)
            advice = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown scheduler {name!r:.80}; {advice}accepted: {', '.join(SCHEDULERS)}")
    return _NAMES[name]


def describes(config: Mapping[str, Any], name: str) -> bool:
    """Whether `config` is the file of the solver called `name` itself, rather than of one that it replaces."""
    return config.get("_class_name") in (*_CLASSES,) and scheduler_name(config) == name


def scheduler_name(config: Mapping[str, Any]) -> str:
    """Our name for the scheduler that a diffusers scheduler_config.json describes, by its `_class_name`.

    Its `algorithm_type`, `use_karras_sigmas` and similar settings choose the form.

    Args:
        config: The contents of the file.

    Returns:
        One of `SCHEDULERS`.

    Raises:
        ValueError: The class is not supported.
    """
    kind = config.get("_class_name")
    if not isinstance(kind, str) or kind not in _CLASSES:
        raise ValueError(f"unsupported scheduler _class_name {kind!r}; accepted: {', '.join(_CLASSES)}")
    name = _CLASSES[kind]
    if name == "dpm++2m" and str(config.get("algorithm_type")).startswith("sde-"):
        name = "dpm++2m-sde"
    keys = {"karras": "use_karras_sigmas", "lu": "use_lu_lambdas"}
    keys |= {"exponential": "use_exponential_sigmas", "beta": "use_beta_sigmas"}
    spaced = (f"{name}-{spacing}" for spacing, key in keys.items() if config.get(key))
    return next((full for full in spaced if full in SCHEDULERS), name)
