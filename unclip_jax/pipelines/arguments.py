"""Checks of a pipeline's arguments. Everything is refused here, by name, before anything is compiled."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unclip_jax.sampling.guidance import Guidance, limit_interval
from unclip_jax.sampling.solvers import Solver

MAX_SEED = 2**32 - 1
MAX_NOISE_LEVEL = 1000
MAX_SCALE = 1e4


def check_integer(name: str, value: Any, low: int, high: int) -> int:
    """An integer in low..high (numpy's too, booleans not)."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; want an integer from {low} to {high}")
    return int(value)


def check_size(name: str, value: Any, multiple: int, default: int) -> int:
    """A side in pixels, a multiple of `multiple`; None gives the default."""
    if value is None:
        return default
    value = check_integer(name, value, 1, 1 << 16)
    if value % multiple:
        near = max(multiple, round(value / multiple) * multiple)
        raise ValueError(f"{name} is {value}; want a multiple of {multiple}, such as {near}")
    return value


def check_array(name: str, value: Any, *shapes: tuple[int | None, ...]) -> np.ndarray:
    """A finite float32 array of one of the given shapes; None in a shape stands for any size."""
    try:
        array = np.asarray(value, np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is no array of numbers: {error}") from error
    if not any(
        array.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape, strict=True))
        for shape in shapes
    ):
        accepted = " or ".join(str(tuple("any" if s is None else s for s in shape)) for shape in shapes)
        raise ValueError(f"{name} has shape {array.shape}; want {accepted}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinite values")
    return array


def check_prompts(name: str, value: Any, pictures: int) -> list[str]:
    """One string a picture; a single string stands for all."""
    if isinstance(value, str):
        return [value] * pictures
    if not isinstance(value, Sequence) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{name} is {value!r}; want a string, or a list of one string a picture")
    if len(value) != pictures:
        raise ValueError(f"{name} has {len(value)} strings; there are {pictures} pictures, want one for each")
    return list(value)


def check_noise_levels(value: Any, pictures: int) -> np.ndarray:
    """(pictures,) int32 rows of the noise schedule. 1000, the model card's pure noise, is its last row, 999."""
    levels = value if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str) else [value] * pictures
    if len(levels) != pictures:
        raise ValueError(f"noise_level has {len(levels)} values; there are {pictures} pictures, want one for each")
    checked = [check_integer("noise_level", level, 0, MAX_NOISE_LEVEL) for level in levels]
    return np.minimum(np.asarray(checked, np.int32), MAX_NOISE_LEVEL - 1)


def check_weights(value: Any, pictures: int) -> np.ndarray:
    """(pictures,) finite float32 weights of any sign whose sum is not zero."""
    weights = check_array("image_weights", value, (pictures,))
    if abs(float(weights.sum())) < 1e-6 * float(np.abs(weights).sum()) or not weights.any():
        raise ValueError(f"image_weights {weights.tolist()} sum to zero; the mix divides by their sum")
    return weights


def solver_steps(solver: Solver) -> np.ndarray:
    """(calls,) int: which step each network call belongs to. Calls that repeat a timestep are one step."""
    timesteps = np.asarray(solver.grid["timestep"])
    return np.concatenate([[0], np.cumsum(timesteps[1:] != timesteps[:-1])]).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class ProjectedGuidance:
    """Adaptive projected guidance (Sadat et al. 2024, arXiv:2410.02416), see `unclip_jax.sampling.guidance.project`.

    eta: 0..1, how much of the part along the prediction is kept. threshold: above 0, the longest update, in latents'
    units. momentum: in (-1, 1), of earlier updates; negative ones push away from them.
    """

    eta: float = 0.0
    threshold: float = math.inf
    momentum: float = 0.0

    def __post_init__(self) -> None:
        check_number("eta", self.eta, 0, 1)
        check_number("momentum", self.momentum, -1, 1)
        if not isinstance(self.threshold, int | float) or not self.threshold > 0:
            raise ValueError(f"threshold is {self.threshold!r}; want a number above 0")


def check_number(name: str, value: Any, low: float, high: float) -> float:
    """A number in low..high (numpy's too, booleans not)."""
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; want a number from {low:g} to {high:g}")
    return float(value)


def check_guidance(
    a: Mapping[str, Any], scheduler: str, solver: Solver, batch: int
) -> tuple[Guidance, dict[str, np.ndarray]]:
    """What guides a run, and how much at each network call and image, (calls, batch) float32, by `guided`'s names.

    a: a call's arguments. What is 0 is no part of the program; other values are traced. Raises ValueError.
    """
    calls = (solver.calls, batch)
    on, scale = check_guidance_scale(a["guidance_scale"], scheduler, solver, batch)
    perturbed, rescaled = a.get("pag_scale", 0.0), a.get("guidance_rescale", 0.0)
    strengths = {
        "guidance_scale": scale,
        "pag_scale": np.full(calls, check_number("pag_scale", perturbed, 0, MAX_SCALE), np.float32),
        "guidance_rescale": np.full(calls, check_number("guidance_rescale", rescaled, 0, 1), np.float32),
    }
    projected = a.get("projected_guidance")
    if projected is not None:
        if not isinstance(projected, ProjectedGuidance):
            raise ValueError(f"projected_guidance is {projected!r}; want a ProjectedGuidance or None")
        for name, value in dataclasses.asdict(projected).items():
            strengths[f"apg_{name}"] = np.full(calls, value, np.float32)
    if a.get("guidance_interval") is not None:
        interval = a["guidance_interval"]
        if not isinstance(interval, Sequence) or isinstance(interval, str) or len(interval) != 2:
            raise ValueError(f"guidance_interval is {interval!r}; want (low, high)")
        ends = [check_number("guidance_interval", end, 0, math.inf) for end in interval]
        for name, outside in (("guidance_scale", 1.0), ("pag_scale", 0.0)):
            levels = np.asarray(solver.grid["alpha_cumprod"])
            strengths[name] = limit_interval(strengths[name], levels, (ends[0], ends[1]), outside)
    guidance = Guidance(
        unconditional=on,
        projected=on and projected is not None,
        perturbed=perturbed > 0,
        rescaled=rescaled > 0 and (on or perturbed > 0),
    )
    used = {"guidance_scale": on, "pag_scale": guidance.perturbed, "guidance_rescale": guidance.rescaled}
    return guidance, {k: v for k, v in strengths.items() if used.get(k, guidance.projected)}


def check_guidance_scale(value: Any, scheduler: str, solver: Solver, batch: int) -> tuple[bool, np.ndarray]:
    """Whether guidance is on, and its scale for each network call and image, (calls, batch) float32.

    A number, one a step (or a network call), one an image, or (calls, batch). A number switches guidance off: the
    original's procedures at exactly 1, diffusers' at 1 and below. When a list's length fits steps and images alike, it
    is one a step.
    """
    steps, calls = solver_steps(solver), solver.calls
    if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError(f"guidance_scale is {value!r}; want a finite number")
        on = value != 1 if scheduler.startswith("ldm-") else value > 1
        return bool(on), np.full((calls, batch), value, np.float32)
    if isinstance(value, str | bool) or value is None:
        raise ValueError(f"guidance_scale is {value!r}; want a number, one a step, or one an image")
    count = int(steps[-1]) + 1
    scale = check_array("guidance_scale", value, (count,), (calls,), (batch,), (calls, batch))
    if scale.ndim == 2:
        return True, scale
    if len(scale) == count:
        scale = scale[steps]
    return True, np.ascontiguousarray(np.broadcast_to(scale[:, None] if len(scale) == calls else scale, (calls, batch)))
