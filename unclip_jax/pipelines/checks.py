"""Checks of what all calls share. Everything is refused here, by name, before anything is compiled."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np

from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.pipelines.arguments import CommonArguments, OutputType
from unclip_jax.pipelines.defaults import is_default
from unclip_jax.pipelines.instruct_arguments import InstructArguments
from unclip_jax.pipelines.request import Inputs, Request
from unclip_jax.reference import Reference
from unclip_jax.sampling.guidance import Guidance, guidance_by_call, limit_interval
from unclip_jax.sampling.solvers import Solver, choose_solver

MAX_SEED = 2**32 - 1
MAX_IMAGES = 1 << 20
MAX_SCALE = 1e4


def check_integer(name: str, value: Any, low: int, high: int) -> int:
    """An integer in low..high (numpy's too, booleans not)."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; want an integer from {low} to {high}")
    return int(value)


def is_number(value: Any) -> bool:
    """Whether a value is an integer or a float (numpy's too, booleans not)."""
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def check_number(name: str, value: Any, low: float, high: float) -> float:
    """A number in low..high (numpy's too, booleans not)."""
    if not is_number(value) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; want a number from {low:g} to {high:g}")
    return float(value)


def check_flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; want True or False")
    return value


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


def optional_array(name: str, value: Any, *shapes: tuple[int | None, ...]) -> np.ndarray | None:
    """The same, or None."""
    return None if value is None else check_array(name, value, *shapes)


def check_prompts(name: str, value: Any, images: int) -> list[str]:
    """One string per image; a single string stands for all."""
    if isinstance(value, str):
        return [value] * images
    if not isinstance(value, Sequence) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{name} is {value!r}; want a string, or a list of one string per image")
    if len(value) != images:
        raise ValueError(f"{name} has {len(value)} strings; there are {images} images, want one for each")
    return list(value)


def count_texts(name: str, value: Any) -> int:
    """How many prompts are given. Raises ValueError for an empty list."""
    count = 1 if isinstance(value, str) or not hasattr(value, "__len__") else len(value)
    if count == 0:
        raise ValueError(f"{name} is an empty list")
    return count


def check_seed(value: Any, prompts: int, repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """Seeds and indices of the images' keys, (B,) uint32 and (B,) int32.

    One seed: the indices count all images. One for each prompt, or input image: they count the images of each.
    """
    batch = prompts * repeats
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str):
        seed = check_integer("seed", value, 0, MAX_SEED)
        return np.full(batch, seed, np.uint32), np.arange(batch, dtype=np.int32)
    if len(value) != prompts:
        raise ValueError(f"seed has {len(value)} values; want one, or {prompts}, one for each prompt or image")
    seeds = np.array([check_integer("seed", seed, 0, MAX_SEED) for seed in value], np.uint32)
    return np.repeat(seeds, repeats), np.tile(np.arange(repeats, dtype=np.int32), prompts)


def check_latent_shape(config: CheckpointConfig, height: Any, width: Any) -> tuple[int, int, int]:
    """(h, w, channels) of the latents of images of this size in pixels; None is the checkpoint's own size."""
    factor, unit = config.vae.factor, config.vae.factor * config.unet.size_multiple
    default = config.unet.sample_size * factor
    height, width = check_size("height", height, unit, default), check_size("width", width, unit, default)
    return height // factor, width // factor, config.vae.latent_channels


def check_solver(
    config: CheckpointConfig, a: CommonArguments, strength: float | None = None, depth: bool = False
) -> Solver:
    """The solver of a call.

    Args:
        strength: of runs that start from an image; None for runs from pure noise.
        depth: of depth to image, see `unclip_jax.sampling.first_step`.
    """
    steps = check_integer("num_inference_steps", a.num_inference_steps, 1, 1000)
    given = {name for name in ("num_inference_steps", "strength") if not is_default(getattr(a, name, None))}
    if a.eta is not None:
        given.add("eta")
    eta = 0.0 if a.eta is None else a.eta
    return choose_solver(
        a.scheduler, config.scheduler, config.scheduler_config, steps, eta, strength, depth=depth, given=given
    )


def check_request(
    config: CheckpointConfig,
    a: CommonArguments,
    solver: Solver,
    latent_shape: tuple[int, int, int],
    prompt: Any,
    negative_prompt: Any,
    prompts: int | None = None,
) -> Request[None]:
    """The request of a call, without what the task alone has.

    Args:
        prompt, negative_prompt: the call's.
        prompts: how many there must be, as many as images; None: as many as are given.

    Raises:
        ValueError: for an argument out of its range or of another shape.
    """
    repeats = check_integer("num_images_per_prompt", a.num_images_per_prompt, 1, MAX_IMAGES)
    if a.output_type not in get_args(OutputType):
        raise ValueError(f"output_type is {a.output_type!r}; accepted: 'pil', 'np', 'latent'")
    text = (config.text_encoder.context_length, config.text_encoder.width)
    if prompts is None and a.prompt_embeds is not None:
        prompts = len(check_array("prompt_embeds", a.prompt_embeds, (None, *text)))
    if prompts is None:
        prompts = count_texts("prompt", prompt)
    batch = prompts * repeats
    seeds, indices = check_seed(a.seed, prompts, repeats)
    guidance, strengths = check_guidance(a, solver, batch)
    size = batch if a.batch_size is None else check_integer("batch_size", a.batch_size, 1, MAX_IMAGES)
    deep_cache = check_integer("deep_cache", a.deep_cache, 1, 1000)
    if deep_cache > 1 and len(set(guidance_by_call(guidance, strengths, solver.calls))) > 1:
        raise ValueError(f"deep_cache is {deep_cache}, and guidance is off in some steps; want it in all, or in none")
    return Request(
        deep_cache=deep_cache,
        solver=solver,
        guidance=guidance,
        strengths=strengths,
        seeds=seeds,
        indices=indices,
        batch=batch,
        repeats=repeats,
        latent_shape=latent_shape,
        prompts=check_prompts("prompt", prompt, prompts),
        negative_prompts=check_prompts("negative_prompt", negative_prompt, prompts),
        prompt_embeds=optional_array("prompt_embeds", a.prompt_embeds, (1, *text), (prompts, *text)),
        negative_prompt_embeds=optional_array(
            "negative_prompt_embeds", a.negative_prompt_embeds, (1, *text), (prompts, *text)
        ),
        step_noise=optional_array("step_noise", a.step_noise, (solver.calls, batch, *latent_shape)),
        batch_size=min(size, batch),
        output_type=a.output_type,
        inputs=None,
    )


def with_inputs(request: Request[Any], inputs: Inputs, **changes: Any) -> Request[Inputs]:
    """The request with what the task alone has, and other changes."""
    made: Any = dataclasses.replace(request, inputs=inputs, **changes)
    return made


@dataclasses.dataclass(frozen=True)
class ProjectedGuidance:
    """Adaptive projected guidance (Sadat et al. 2024, arXiv:2410.02416), see `unclip_jax.sampling.guidance.project`.

    Attributes:
        eta: 0 to 1, how much of the part along the prediction is kept.
        threshold: above 0, the longest update, in units of the latents.
        momentum: in (-1, 1), of earlier updates; negative ones push away from them.
    """

    eta: float = 0.0
    threshold: float = math.inf
    momentum: float = 0.0

    def __post_init__(self) -> None:
        check_number("eta", self.eta, 0, 1)
        check_number("momentum", self.momentum, -1, 1)
        if not is_number(self.threshold) or not self.threshold > 0:
            raise ValueError(f"threshold is {self.threshold!r}; want a number above 0")


def check_guidance(a: CommonArguments, solver: Solver, batch: int) -> tuple[Guidance, dict[str, np.ndarray]]:
    """What guides a run, and how much at each evaluation and image, (calls, batch) float32, by `guided`'s names.

    What is 0 throughout, or a scale of 1, is no part of the program; other values are traced.
    """
    calls = (solver.calls, batch)
    scales = {"guidance_scale": a.guidance_scale}
    if isinstance(a, InstructArguments):
        scales["image_guidance_scale"] = a.image_guidance_scale
    pag, rescale = check_number("pag_scale", a.pag_scale, 0, MAX_SCALE), a.guidance_rescale
    strengths = {
        **{name: check_guidance_scale(name, value, solver, batch) for name, value in scales.items()},
        "pag_scale": np.full(calls, pag, np.float32),
        "guidance_rescale": np.full(calls, check_number("guidance_rescale", rescale, 0, 1), np.float32),
    }
    projected = a.projected_guidance
    if projected is not None:
        if not isinstance(projected, ProjectedGuidance):
            raise ValueError(f"projected_guidance is {projected!r}; want a ProjectedGuidance or None")
        if len(scales) > 1:
            raise ValueError(f"projected_guidance is {projected!r}; want None with two scales, {' and '.join(scales)}")
        for name, value in dataclasses.asdict(projected).items():
            strengths[f"apg_{name}"] = np.full(calls, value, np.float32)
    if a.guidance_interval is not None:
        interval = a.guidance_interval
        if not isinstance(interval, Sequence) or isinstance(interval, str) or len(interval) != 2:
            raise ValueError(f"guidance_interval is {interval!r}; want (low, high)")
        ends = [check_number("guidance_interval", end, 0, math.inf) for end in interval]
        for name, outside in {**dict.fromkeys(scales, 1.0), "pag_scale": 0.0}.items():
            levels = np.asarray(solver.grid["alpha_cumprod"])
            strengths[name] = limit_interval(strengths[name], levels, (ends[0], ends[1]), outside)
    on = _are_on(scales, solver.reference) and any(bool((strengths[name] != 1).any()) for name in scales)
    perturbed = bool((strengths["pag_scale"] != 0).any())
    guidance = Guidance(
        unconditional=on,
        projected=on and projected is not None,
        perturbed=perturbed,
        rescaled=rescale > 0 and (on or perturbed),
        image=on and len(scales) > 1,
    )
    return guidance, {name: strengths[name] for name in guidance.strengths}


def _are_on(scales: Mapping[str, Any], reference: Reference) -> bool:
    """Whether there is guidance, by scales of `check_guidance_scale`.

    Numbers switch it off: in the original's procedures where all are 1, in diffusers' a guidance_scale of 1 and below,
    and an image_guidance_scale below 1.
    """
    numbers = {name: value for name, value in scales.items() if is_number(value)}
    if reference == Reference.ORIGINAL:
        return len(numbers) < len(scales) or any(value != 1 for value in numbers.values())
    return bool(numbers.get("guidance_scale", 2) > 1 and numbers.get("image_guidance_scale", 1) >= 1)


def check_guidance_scale(name: str, value: Any, solver: Solver, batch: int) -> np.ndarray:
    """A scale of guidance for each network evaluation and image, (calls, batch) float32.

    A number, one per step (or network evaluation), one per image, or (calls, batch). A list whose length fits steps and
    images alike is one per step.
    """
    steps, calls = solver.steps, solver.calls
    if is_number(value):
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value!r}; want a finite number")
        return np.full((calls, batch), value, np.float32)
    if isinstance(value, str | bool) or value is None:
        raise ValueError(f"{name} is {value!r}; want a number, one per step, or one per image")
    count = int(steps[-1]) + 1
    scale = check_array(name, value, (count,), (calls,), (batch,), (calls, batch))
    if scale.ndim == 2:
        return scale
    if len(scale) == count:
        scale = scale[steps]
    return np.ascontiguousarray(np.broadcast_to(scale[:, None] if len(scale) == calls else scale, (calls, batch)))
