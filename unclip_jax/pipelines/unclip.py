"""Image variations with Stable Diffusion 2.1 unCLIP: images and an optional prompt in, variations out.

images -> CLIP embeddings -> noised to a level (and mixed) -> class labels --+
prompt -> tokens -> text encoder --------------------------> text states ----+-> denoising loop -> VAE -> images
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.conditioning.clip_image import load_images
from unclip_jax.distributed.mesh import Chunk
from unclip_jax.pipelines.arguments import ImageToImageArguments, InpaintArguments, UnCLIPArguments
from unclip_jax.pipelines.checks import (
    MAX_IMAGES,
    check_array,
    check_integer,
    check_latent_shape,
    check_request,
    check_solver,
    optional_array,
    with_inputs,
)
from unclip_jax.pipelines.parts import Parts, encode_image_embeds, from_noise, text_states
from unclip_jax.pipelines.pipeline import Pipeline, calls, streams
from unclip_jax.pipelines.request import Conditions, Request, Task

MAX_NOISE_LEVEL = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageCondition:
    """The images that an unCLIP checkpoint is conditioned by: P conditions, each of one image, or a mix of K.

    Attributes:
        images: P K of (H, W, 3) uint8, condition by condition; or
        image_embeds: (P K, D).
        noise_level: (P, K) rows of the noise schedule.
        weights: (P, K) of the mixes; None: no mix, and K is 1.
        mix_noise_level: (P,), the level to which a mix is noised once more.
        image_noise: (B, draws, D), one for each image of a condition, and one for a mix that is noised again.
    """

    images: list[np.ndarray] | None
    image_embeds: np.ndarray | None
    noise_level: np.ndarray
    weights: np.ndarray | None = None
    mix_noise_level: np.ndarray | None = None
    image_noise: np.ndarray | None = None

    @property
    def count(self) -> int:
        """P."""
        return len(self.noise_level)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """latents: (B, h, w, 4) initial noise; None: by the images' keys."""

    condition: ImageCondition
    latents: np.ndarray | None


def check(config: CheckpointConfig, a: UnCLIPArguments) -> Request[Inputs]:
    """Checks every argument; touches no device. Raises ValueError, FileNotFoundError."""
    shape, solver = check_latent_shape(config, a.height, a.width), check_solver(config, a)
    condition = check_condition(
        config,
        a.image,
        a.image_embeds,
        a.noise_level,
        a.image_noise,
        a.num_images_per_prompt,
        weights=a.image_weights,
        mix_noise_level=a.mix_noise_level,
    )
    request = check_request(config, a, solver, shape, a.prompt, a.negative_prompt, condition.count)
    latents = optional_array("latents", a.latents, (request.batch, *shape))
    return with_inputs(request, Inputs(condition, latents))


def conditions(parts: Parts, request: Request[Inputs]) -> Conditions:
    """What the denoiser is told."""
    inputs = request.inputs
    embeds, labels = image_labels(parts, inputs.condition)
    text, negative = text_states(parts, request)
    start = from_noise(parts, request, inputs.latents)
    return Conditions(text, negative, start, labels, image_embeds=embeds)


class UnCLIPPipeline(Pipeline):
    """Makes variations of images."""

    accepts = ("variations",)
    diffusers_class = "StableUnCLIPImg2ImgPipeline"
    task = Task(UnCLIPArguments, check, conditions)

    @calls(UnCLIPArguments)
    def __call__(self) -> Any: ...

    @streams(UnCLIPArguments)
    def stream(self) -> Any: ...


# -- the condition, for every pipeline that takes unCLIP checkpoints ---------------------------------------------------


def check_condition(
    config: CheckpointConfig,
    image: Any,
    image_embeds: Any,
    noise_level: Any,
    image_noise: Any,
    num_images_per_prompt: Any,
    *,
    weights: Any = None,
    mix_noise_level: Any = None,
    name: str = "image",
) -> ImageCondition:
    """The condition of a call, from the arguments of these names. name: what the argument `image` is called there.

    Raises ValueError, FileNotFoundError.
    """
    width = config.image_embedding_dim
    assert width is not None
    if (image is None) == (image_embeds is None):
        found = "got neither" if image is None else "not both"
        raise ValueError(f"give one of {name} and image_embeds, {found}")
    images, embeds = None, None
    if image is not None:
        images = _load(config, image, name)
        count = len(images)
    else:
        embeds = check_array("image_embeds", image_embeds, (None, width))
        count = len(embeds)
    if count == 0:
        raise ValueError("image_embeds has no rows")

    mix_level = None
    if weights is not None:
        weights = check_weights(weights, count)
        if mix_noise_level is not None:
            mix_level = check_noise_levels(mix_noise_level, 1)
    elif mix_noise_level is not None:
        raise ValueError("mix_noise_level is given without image_weights: there is no mix to noise")
    levels = check_noise_levels(noise_level, count)

    repeats = check_integer("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES)
    noise = image_noise
    if noise is not None and weights is None:
        batch = count * repeats
        noise = check_array("image_noise", noise, (batch, width), (count, width))
        noise = (noise if len(noise) == batch else np.repeat(noise, repeats, axis=0))[:, None]
    elif noise is not None:
        noise = check_array("image_noise", noise, (repeats, count + (mix_level is not None), width))
    return ImageCondition(
        images=images,
        image_embeds=embeds,
        noise_level=levels[:, None] if weights is None else levels[None],
        weights=None if weights is None else weights[None],
        mix_noise_level=mix_level,
        image_noise=noise,
    )


def check_own_condition(
    config: CheckpointConfig,
    a: ImageToImageArguments | InpaintArguments,
    images: Any,
    prompts: int,
    condition_image: Any = None,
) -> ImageCondition | None:
    """The condition of a pipeline that starts from `image`; None for other checkpoints than unCLIP's.

    It is what the call gives for it alone, `condition_image` or `image_embeds`, or else the images themselves. One
    stands for all prompts.

    Raises:
        ValueError, FileNotFoundError: also for arguments that would be ignored.
    """
    if config.task != "variations":
        given = {"condition_image": condition_image, "image_embeds": a.image_embeds, "image_noise": a.image_noise}
        ignored = [name for name, value in given.items() if value is not None]
        ignored += ["noise_level"] if np.any(a.noise_level) else []
        if ignored:
            raise ValueError(f"{ignored[0]} is given, but this is not an unCLIP checkpoint")
        return None
    name = "image" if condition_image is None else "condition_image"
    image: Any = None
    embeds: Any = None
    image, embeds = images if condition_image is None else condition_image, a.image_embeds
    if condition_image is None and embeds is not None:
        image = None
    if image is not None:
        loaded = load_images(image, name)
        image = loaded * prompts if len(loaded) == 1 else loaded
    elif np.shape(embeds)[:1] == (1,):
        embeds = np.repeat(embeds, prompts, axis=0)
    condition = check_condition(config, image, embeds, a.noise_level, a.image_noise, a.num_images_per_prompt, name=name)
    if condition.count != prompts:
        which = "image_embeds" if condition.images is None else name
        raise ValueError(f"{which} has {condition.count} entries; want {prompts}, one per image, or one for all")
    return condition


def check_noise_levels(value: Any, images: int) -> np.ndarray:
    """(images,) int32 rows of the noise schedule. 1000, the model card's pure noise, is its last row, 999."""
    levels = value if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str) else [value] * images
    if len(levels) != images:
        raise ValueError(f"noise_level has {len(levels)} values; there are {images} images, want one for each")
    checked = [check_integer("noise_level", level, 0, MAX_NOISE_LEVEL) for level in levels]
    return np.minimum(np.asarray(checked, np.int32), MAX_NOISE_LEVEL - 1)


def check_weights(value: Any, images: int) -> np.ndarray:
    """(images,) finite float32 weights of any sign whose sum is not zero."""
    weights = check_array("image_weights", value, (images,))
    if abs(float(weights.sum())) < 1e-6 * float(np.abs(weights).sum()) or not weights.any():
        raise ValueError(f"image_weights {weights.tolist()} sum to zero; the mix divides by their sum")
    return weights


def image_labels(parts: Parts, condition: ImageCondition) -> tuple[np.ndarray, Callable[[Chunk], jax.Array]]:
    """The embeddings (P K, D) of P conditions, and the class labels (R, 2 D) that they become."""
    embeds = condition.image_embeds
    if embeds is None:
        embeds = encode_image_embeds(parts, condition.images or [])
    width, levels, weights = embeds.shape[-1], condition.noise_level, condition.weights
    mix_levels, noise = condition.mix_noise_level, condition.image_noise

    def labels(chunk: Chunk) -> jax.Array:
        return parts.programs.class_labels(
            chunk.of_prompts(embeds.reshape(*levels.shape, width)),
            chunk.of_prompts(levels),
            None if weights is None else chunk.of_prompts(weights),
            None if mix_levels is None else chunk.of_prompts(mix_levels),
            None if noise is None else chunk.of_images(noise),
            chunk.seeds,
            chunk.indices,
            parts.noising,
            mixed=weights is not None,
            width=width,
        )

    return embeds, labels


def _load(config: CheckpointConfig, image: Any, name: str) -> list[np.ndarray]:
    if config.image_encoder is None:
        raise ValueError(f"{name} is given, but this checkpoint has no image encoder; want image_embeds")
    images = load_images(image, name)
    if config.preprocess.startswith("original"):
        for loaded in images:
            if min(loaded.shape[:2]) < 64:
                raise ValueError(
                    f"{name} is {loaded.shape[1]}x{loaded.shape[0]}; the {config.preprocess!r} preprocessing needs "
                    "sides of at least 64 pixels"
                )
    return images
