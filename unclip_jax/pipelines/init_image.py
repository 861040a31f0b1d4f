"""Images that a run starts from, or that the VAE encodes for another use."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.conditioning.clip_image import several
from unclip_jax.conditioning.vae_image import Resample, load_init_image, start_pixels
from unclip_jax.distributed.mesh import Chunk
from unclip_jax.models.configs import AutoencoderTinyConfig
from unclip_jax.pipelines.arguments import InitImageArguments
from unclip_jax.pipelines.checks import check_array, check_flag, check_size, optional_array
from unclip_jax.pipelines.parts import Parts, noise_of, started
from unclip_jax.pipelines.request import BY_CALL, Request
from unclip_jax.sampling.loop import Carry
from unclip_jax.sampling.noise import Branch

Loaded = TypeVar("Loaded")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitImage:
    """The images that a run starts from, one per prompt or one for all, and the noise for their encoding.

    Attributes:
        pixels: (images, H, W, 3) in -1..1.
        sample_posterior: whether the latents are drawn from the posterior, or are its mode.
        posterior_noise: (encodings, B, h, w, 4); None: by the images' keys.
        noise: (B, h, w, 4), added to the latents; None: by the images' keys.
    """

    pixels: np.ndarray
    sample_posterior: bool
    posterior_noise: np.ndarray | None = dataclasses.field(metadata=BY_CALL)
    noise: np.ndarray | None


def load_init_images(value: Any) -> list[np.ndarray]:
    """The argument `image`, one or a list -> (H, W, 3) uint8, or float32 in 0..1, each. Raises ValueError."""
    if value is None:
        raise ValueError("image is missing: give an image, or a list of them")
    return [load_init_image(image) for image in several(value)]


def load_each(name: str, value: Any, images: int, load: Callable[[Any], Loaded], noun: str) -> list[Loaded]:
    """What is given once per image, or once for all: (images,) of `load`'s results.

    noun: what there are several of, for the refusal. Raises ValueError for another number.
    """
    loaded = [load(one) for one in value] if isinstance(value, list | tuple) else [load(value)] * images
    if len(loaded) != images:
        raise ValueError(f"{name} has {len(loaded)} {noun}; there are {images} images, want one for each")
    return loaded


def resize_images(
    config: CheckpointConfig,
    images: Sequence[np.ndarray],
    height: int | None,
    width: int | None,
    resample: Resample = "lanczos",
) -> np.ndarray:
    """(images, H, W, 3) in -1..1: of the given size, or of their own, rounded down to what the UNet takes.

    Raises ValueError for sizes that are no multiples, and for images of several sizes without a given one.
    """
    multiple = config.vae.factor * config.unet.size_multiple
    height, width = (
        None if side is None else check_size(name, side, multiple, 0)
        for name, side in (("height", height), ("width", width))
    )
    pixels = [start_pixels(image, height, width, multiple=multiple, resample=resample) for image in images]
    if len({array.shape for array in pixels}) > 1:
        sizes = ", ".join(f"{array.shape[1]}x{array.shape[0]}" for array in pixels)
        raise ValueError(f"image: the images are of several sizes ({sizes}); give height and width")
    return np.stack(pixels)


def latent_shape_of(config: CheckpointConfig, pixels: np.ndarray) -> tuple[int, int, int]:
    """(h, w, channels) of the latents of images (..., H, W, 3)."""
    height, width = pixels.shape[-3:-1]
    return height // config.vae.factor, width // config.vae.factor, config.vae.latent_channels


def count_prompts(prompt: Any, images: int) -> int:
    """How many prompts a call has: as many as images, or, where there is one image, as are given."""
    if images > 1 or isinstance(prompt, str) or not hasattr(prompt, "__len__"):
        return images
    return max(1, len(prompt))


def check_init(
    config: CheckpointConfig, a: InitImageArguments, pixels: np.ndarray, request: Request[Any], encodings: int = 1
) -> InitImage:
    """The images with the noise for their encoding. Raises ValueError.

    encodings: how often an image's pixels are encoded; noise for one serves all.
    """
    check_flag("sample_posterior", a.sample_posterior)
    given, one = a.posterior_noise, (request.batch, *request.latent_shape)
    encoding, draws = None, a.sample_posterior and not isinstance(config.vae, AutoencoderTinyConfig)
    if given is not None:
        shapes = (one, (encodings, *one)) if encodings > 1 else (one,)
        encoding = np.broadcast_to(check_array("posterior_noise", given, *shapes), (encodings, *one))
        if not a.sample_posterior:
            raise ValueError("posterior_noise is given, but sample_posterior is False: nothing is drawn")
        if not draws:
            raise ValueError("posterior_noise is given, but a tiny autoencoder predicts latents: nothing is drawn")
    return InitImage(
        pixels=pixels,
        sample_posterior=draws,
        posterior_noise=encoding,
        noise=optional_array("noise", a.noise, one),
    )


def sample_latents(
    parts: Parts, request: Request[Any], init: InitImage, moments: np.ndarray, chunk: Chunk, number: int = 0
) -> jax.Array:
    """Scaled latents (R, h, w, 4) of encoded images, one per prompt or one for all.

    number: which encoding of an image it is, where there are several.
    """
    given = None if init.posterior_noise is None else init.posterior_noise[number]
    if not init.sample_posterior:
        given = np.zeros((request.batch, *request.latent_shape), np.float32)
    noise = noise_of(parts, given, Branch.POSTERIOR, request.latent_shape, chunk, number)
    return parts.programs.sample_latents(chunk.of_prompts(moments), noise)


def from_image(parts: Parts, request: Request[Any], init: InitImage, moments: np.ndarray) -> Callable[[Chunk], Carry]:
    """A run that starts from images, noised to the level of the solver's start. moments: of their encoding."""

    def start(chunk: Chunk) -> Carry:
        latents = sample_latents(parts, request, init, moments, chunk)
        noise = noise_of(parts, init.noise, Branch.LATENTS, request.latent_shape, chunk)
        return started(parts, request, noise, latents)

    return start
