"""Depth and surface normals of images, estimated by a Stable Diffusion 2 that was trained to.

image -> VAE -> latents --------------------------+
noise, for each prediction of an ensemble --------+-> denoising loop -> VAE -> maps -> one map
the empty prompt -> text encoder -> text states --+

Source: Ke et al. 2024, arXiv:2312.02145; diffusers' MarigoldDepthPipeline and MarigoldNormalsPipeline. Those
that predict their map at once, from the image alone or with noise, are Lotus (He et al. 2024, arXiv:2409.18124).
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_args

import jax
import numpy as np
from PIL import Image

from unclip_jax.checkpoints.config import CheckpointConfig, EstimatorConfig
from unclip_jax.conditioning.resample import ResampleMethod, check_method, longest_side, resample
from unclip_jax.conditioning.vae_image import pad_to_multiple, to_pixels
from unclip_jax.distributed.mesh import Chunk
from unclip_jax.estimation import ensemble
from unclip_jax.estimation.colours import depth_picture, normals_picture
from unclip_jax.pipelines.arguments import CommonArguments, OutputType
from unclip_jax.pipelines.checks import (
    MAX_IMAGES,
    check_flag,
    check_integer,
    check_request,
    check_solver,
    is_number,
    optional_array,
    with_inputs,
)
from unclip_jax.pipelines.estimate_arguments import EstimateArguments
from unclip_jax.pipelines.finish import Marks
from unclip_jax.pipelines.init_image import load_init_images
from unclip_jax.pipelines.output import PipelineOutput
from unclip_jax.pipelines.parts import Parts, decode_values, encode, from_noise, started, vae_encode
from unclip_jax.pipelines.pipeline import Pipeline, calls, streams
from unclip_jax.pipelines.request import Conditions, Request, Task
from unclip_jax.pipelines.run import sample_latents

# The empty prompt's tokens: its beginning and its end, without what fills a row up.
EMPTY_TOKENS = 2
REDUCTIONS = {"depth": get_args(ensemble.DepthReduction), "normals": get_args(ensemble.NormalsReduction)}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What an estimate has beside what all calls have.

    Attributes:
        pixels: (images, H, W, 3) in -1..1, padded.
        size: (height, width) of the maps before they are padded.
        original: (height, width) that they get in the end.
        method: how they get it.
        latents: (B, h, w, 4) initial noise; None: by the images' keys.
        options: of the ensemble's reduction.
        uncertain: whether the uncertainty is asked for.
    """

    pixels: np.ndarray
    size: tuple[int, int]
    original: tuple[int, int]
    method: ResampleMethod
    latents: np.ndarray | None
    options: Mapping[str, Any]
    uncertain: bool


def check(config: CheckpointConfig, a: EstimateArguments) -> Request[Inputs]:
    """Checks every argument; touches no device. Raises ValueError, FileNotFoundError."""
    own, factor = config.estimator or EstimatorConfig(), config.vae.factor
    count = check_integer("ensemble_size", a.ensemble_size, 1, MAX_IMAGES)
    if check_flag("output_uncertainty", a.output_uncertainty) and count == 1:
        raise ValueError("output_uncertainty is True and ensemble_size is 1; want two predictions at least")
    methods = [check_method(name, getattr(a, name)) for name in ("resample_method_input", "resample_method_output")]
    if own.direct:
        _check_direct(config, a)
    side = _given("processing_resolution", a.processing_resolution, own.processing_resolution)
    if check_integer("processing_resolution", side, 0, 1 << 16) % factor:
        raise ValueError(f"processing_resolution is {side}; want a multiple of {factor}")
    images = [to_pixels(image) for image in load_init_images(a.image)]
    sizes = {image.shape[:2] for image in images}
    if len(sizes) > 1:
        raise ValueError(
            f"image: the images are of several sizes ({', '.join(f'{w}x{h}' for h, w in sorted(sizes))}); "
            "give those of one size in a call"
        )
    (original,) = sizes
    size = longest_side(original[0], original[1], side) if side else original
    pixels = [resample(image, size[0], size[1], methods[0], antialias=True) for image in images]
    if not own.direct:
        pixels = [pad_to_multiple(image, factor, least=factor) for image in pixels]
    shape = (pixels[0].shape[0] // factor, pixels[0].shape[1] // factor, config.vae.latent_channels)
    if 0 in shape:
        raise ValueError(f"image is {size[1]}x{size[0]} pixels to the network; want sides of at least {factor}")
    if own.direct:  # what is left over is not in the latents, and the map is stretched over it
        size = factor * shape[0], factor * shape[1]
    common = CommonArguments(
        num_inference_steps=_given("num_inference_steps", a.num_inference_steps, own.num_inference_steps),
        guidance_scale=1,
        num_images_per_prompt=count,
        scheduler=a.scheduler,
        eta=a.eta,
        seed=a.seed,
        step_noise=a.step_noise,
        batch_size=a.batch_size,
        output_type=a.output_type,
    )
    solver = check_solver(_at_once(config) if own.direct else config, common)
    request = check_request(config, common, solver, shape, "", "", len(images))
    inputs = Inputs(
        pixels=np.stack(pixels),
        size=size,
        original=original if check_flag("match_input_resolution", a.match_input_resolution) else size,
        method=methods[1],
        latents=optional_array("latents", a.latents, (request.batch, *shape)),
        options=_check_options(config.task, a.ensembling_kwargs),
        uncertain=a.output_uncertainty,
    )
    return with_inputs(request, inputs)


def conditions(parts: Parts, request: Request[Inputs]) -> Conditions:
    """What the denoiser is told."""
    tokens = parts.tokenizer([""])[:, :EMPTY_TOKENS]
    text = encode(parts, "text_encoder", parts.programs.embed_text, tokens, "encoding the empty prompt")
    moments = vae_encode(parts, request.inputs.pixels)
    start = from_noise(parts, request, request.inputs.latents)

    def latents(chunk: Chunk) -> jax.Array:
        encoded: jax.Array = parts.programs.sample_latents(chunk.of_prompts(moments), None)
        return encoded

    if not parts.config.direct:
        return Conditions(text, None, start, channels=latents)
    switches = np.array([[1, 0]], np.float32)  # to estimate, and not to give the image back
    labels = np.concatenate([np.sin(switches), np.cos(switches)], axis=-1)
    told = Conditions(text, None, start, labels=lambda chunk: chunk.of_prompts(labels))
    if parts.config.reads_two_latents:
        return told._replace(channels=latents)
    return told._replace(start=lambda chunk: started(parts, request, latents(chunk), None))


def finish(parts: Parts, request: Request[Inputs], latents: np.ndarray) -> PipelineOutput:
    """Latents (B, h, w, 4) -> maps, one of each image: taken out of their padding, reduced, and resized."""
    asked, task = request.inputs, parts.config.task
    values = decode_values(parts, latents)[:, : asked.size[0], : asked.size[1]]
    own = parts.config.estimator or EstimatorConfig()
    maps = _depths(values, own) if task == "depth" else _normals(values, own)
    made = [_reduced(parts.config, request, maps[first:][: request.repeats]) for first in _firsts(request)]
    prediction, uncertainty = (
        np.stack([resample(one, *asked.original, asked.method, antialias=False) for one in maps])
        for maps in zip(*made, strict=True)
    )
    if task == "normals" and asked.original != asked.size:
        prediction = ensemble.unit_length(prediction)
    images: Any = {"np": prediction, "latent": latents}.get(request.output_type)
    if images is None:
        far = 1 - prediction if own.prediction_type == "disparity" else prediction
        images = [depth_picture(one) for one in far] if task == "depth" else [*map(normals_picture, prediction)]
    rows = np.arange(len(prediction))
    return PipelineOutput(images, latents, None, None, rows, prediction, uncertainty if asked.uncertain else None)


def images_of(parts: Parts, marks: Marks, request: Request[Inputs]) -> Callable[[np.ndarray], list[Image.Image]]:
    """What makes maps in colours of a request's latents. marks: not put on them."""

    def images(latents: np.ndarray) -> list[Image.Image]:
        made: list[Image.Image] = finish(parts, request, latents).images
        return made

    return images


def _firsts(request: Request[Inputs]) -> range:
    return range(0, request.batch, request.repeats)


def _reduced(config: CheckpointConfig, request: Request[Inputs], maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One map of the predictions of an image, and its uncertainty, zeros of one prediction."""
    if len(maps) == 1:
        return maps[0], np.zeros_like(maps[0, ..., :1])
    if config.task == "normals":
        return ensemble.ensemble_normals(maps, **request.inputs.options)
    own = config.estimator or EstimatorConfig()
    return ensemble.ensemble_depth(maps, own.scale_invariant, own.shift_invariant, **request.inputs.options)


def _depths(values: np.ndarray, own: EstimatorConfig) -> np.ndarray:
    """What the VAE gives, (B, H, W, 3) -> depths in 0..1, (B, H, W, 1)."""
    if own.direct:
        values = np.clip(values, -1, 1)
    return (np.clip(values.mean(axis=-1, keepdims=True), -1, 1) + 1) / 2


def _normals(values: np.ndarray, own: EstimatorConfig) -> np.ndarray:
    """What the VAE gives, (B, H, W, 3) -> unit normals."""
    values = np.clip(values, -1, 1)
    if not own.use_full_z_range:
        values[..., 2] = values[..., 2] * 0.5 + 0.5
    return ensemble.unit_length(values)


def _at_once(config: CheckpointConfig) -> CheckpointConfig:
    """With the solver whose one step, from the last timestep, ends at what the UNet predicts."""
    settings = {"prediction_type": "sample", "timestep_spacing": "trailing", "set_alpha_to_one": True}
    settings |= {"clip_sample": False, "thresholding": False, "rescale_betas_zero_snr": False}
    return dataclasses.replace(config, scheduler="ddim", scheduler_config={**config.scheduler_config, **settings})


def _check_direct(config: CheckpointConfig, a: EstimateArguments) -> None:
    """Raises ValueError for what an estimator that predicts its map at once does not have."""
    for name in ("scheduler", "eta", "step_noise"):
        if getattr(a, name) is not None:
            raise ValueError(f"{name} is given, and this estimator predicts its map at once: leave it out")
    if a.num_inference_steps not in (None, 1):
        raise ValueError(f"num_inference_steps is {a.num_inference_steps!r}; this estimator has 1")
    if not config.reads_two_latents and (a.ensemble_size != 1 or a.latents is not None):
        name = "latents is given" if a.latents is not None else f"ensemble_size is {a.ensemble_size}"
        raise ValueError(f"{name}, and this estimator reads no noise: it predicts one map")


def _given(name: str, value: Any, own: int | None) -> Any:
    if value is None and own is None:
        raise ValueError(f"{name} is missing: this checkpoint does not say how many it needs")
    return own if value is None else value


def _check_options(task: str, options: Any) -> dict[str, Any]:
    """The options of the ensemble's reduction. Raises ValueError for others, and for values out of their ranges."""
    reduce = ensemble.ensemble_depth if task == "depth" else ensemble.ensemble_normals
    known = [name for name in inspect.signature(reduce).parameters if name not in _NOT_OPTIONS]
    if not isinstance(options, Mapping | None):
        raise ValueError(f"ensembling_kwargs is {options!r:.80}; want a dict")
    given = dict(options or {})
    if unknown := given.keys() - set(known):
        raise ValueError(f"ensembling_kwargs has {', '.join(sorted(map(str, unknown)))}; accepted: {', '.join(known)}")
    for name, value in given.items():
        where = f"ensembling_kwargs[{name!r}]"
        if name == "reduction":
            if value not in REDUCTIONS[task]:
                raise ValueError(f"{where} is {value!r}; accepted: {', '.join(REDUCTIONS[task])}")
        elif name in ("max_iter", "max_res"):
            check_integer(where, value, 1, 1 << 16)
        elif not is_number(value) or not 0 <= value < np.inf:
            raise ValueError(f"{where} is {value!r}; want a number of at least 0")
    return given


_NOT_OPTIONS = ("depths", "normals", "scale_invariant", "shift_invariant")


class Estimator(Pipeline):
    """What both estimators share. Their maps are neither marked nor checked for safety."""

    task = Task(EstimateArguments, check, conditions)
    _images_of = staticmethod(images_of)

    @calls(EstimateArguments)
    def __call__(self) -> Any: ...

    @streams(EstimateArguments)
    def stream(self) -> Any: ...

    def _check(self, arguments: Any, output_type: OutputType | None = None) -> Request[Any]:
        request: Request[Any] = self.task.check(self.config, arguments)
        return request if output_type is None else dataclasses.replace(request, output_type=output_type)

    def _make(self, arguments: Any) -> PipelineOutput:
        request, now = self._check(arguments), self.parts
        latents = sample_latents(now, request, self.task.conditions(now, request))
        return finish(now, request, latents)


class DepthPipeline(Estimator):
    """Estimates how far what an image shows is: `prediction` (images, H, W, 1) in 0..1, from near to far."""

    accepts = ("depth",)
    diffusers_class = "MarigoldDepthPipeline"


class NormalsPipeline(Estimator):
    """Estimates how surfaces in an image lie: `prediction` (images, H, W, 3), unit vectors; x right, y up, z nearer."""

    accepts = ("normals",)
    diffusers_class = "MarigoldNormalsPipeline"
