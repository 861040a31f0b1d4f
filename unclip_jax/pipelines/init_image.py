"""Pictures that a run begins with, or that it looks at through the VAE."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.conditioning.clip_image import several
from unclip_jax.conditioning.vae_image import Resample, load_init_image, start_pixels
from unclip_jax.pipelines import arguments as check


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitImage:
    """The pictures that a run begins with, one a prompt or one for all, and the noise by which they are encoded.

    pixels: (pictures, H, W, 3) in -1..1. posterior_noise: (encodings, B, h, w, 4), None by the images' keys; where
    `sample_posterior` is False the encoding is the posterior's mode. noise: what is added to them, (B, h, w, 4).
    """

    pixels: np.ndarray
    sample_posterior: bool
    posterior_noise: np.ndarray | None
    noise: np.ndarray | None


def load_init_images(value: Any) -> list[np.ndarray]:
    """The argument `image`, one or a list -> (H, W, 3) uint8, or float32 in 0..1, each. Raises ValueError."""
    if value is None:
        raise ValueError("image is missing: give a picture, or a list of them")
    return [load_init_image(picture) for picture in several(value)]


def pixels_of(
    config: CheckpointConfig,
    pictures: Sequence[np.ndarray],
    height: int | None,
    width: int | None,
    resample: Resample = "lanczos",
) -> np.ndarray:
    """(pictures, H, W, 3) in -1..1: of the size given, or of their own, rounded down to what the UNet takes.

    Raises ValueError for sizes that are no multiples, and for pictures of several sizes without one given.
    """
    multiple = config.vae.factor * config.unet.size_multiple
    height, width = (
        None if side is None else check.check_size(name, side, multiple, 0)
        for name, side in (("height", height), ("width", width))
    )
    pixels = [start_pixels(picture, height, width, multiple=multiple, resample=resample) for picture in pictures]
    if len({array.shape for array in pixels}) > 1:
        sizes = ", ".join(f"{array.shape[1]}x{array.shape[0]}" for array in pixels)
        raise ValueError(f"image: the pictures are of several sizes ({sizes}); give height and width")
    return np.stack(pixels)


def latent_shape_of(config: CheckpointConfig, pixels: np.ndarray) -> tuple[int, int, int]:
    """(h, w, channels) of the latents of pictures (..., H, W, 3)."""
    height, width = pixels.shape[-3:-1]
    return height // config.vae.factor, width // config.vae.factor, config.vae.latent_channels


def count_prompts(a: Mapping[str, Any], pictures: int) -> int:
    """How many prompts a call has: as many as pictures, or, where there is one picture, as are given."""
    if pictures > 1 or isinstance(a["prompt"], str) or not hasattr(a["prompt"], "__len__"):
        return pictures
    return max(1, len(a["prompt"]))


def check_start(
    a: Mapping[str, Any], pixels: np.ndarray, batch: int, latent_shape: tuple[int, int, int], encodings: int = 1
) -> InitImage:
    """The start pictures with the noise in a call's arguments `a`. Raises ValueError.

    encodings: how often an image's pictures are encoded; noise for one serves all.
    """
    if not isinstance(a["sample_posterior"], bool):
        raise ValueError(f"sample_posterior is {a['sample_posterior']!r}; want True or False")
    noise, encoding, one = a.get("noise"), a["posterior_noise"], (batch, *latent_shape)
    if encoding is not None:
        shapes = (one, (encodings, *one)) if encodings > 1 else (one,)
        encoding = check.check_array("posterior_noise", encoding, *shapes)
        encoding = np.broadcast_to(encoding, (encodings, *one))
        if not a["sample_posterior"]:
            raise ValueError("posterior_noise is given, but sample_posterior is False: nothing is drawn")
    return InitImage(
        pixels=pixels,
        sample_posterior=a["sample_posterior"],
        posterior_noise=encoding,
        noise=None if noise is None else check.check_array("noise", noise, one),
    )
