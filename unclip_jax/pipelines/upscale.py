"""Upscaling by four: a small image, noised a little, is a part of what the UNet reads.

small image -> noised to `noise_level` ---------> three channels beside the latents --+
noise_level -> class label -----------------------------------------------------------+-> loop -> VAE -> images
prompt      -> text encoder --------------------> text states ------------------------+
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.conditioning.upscale import check_levels
from unclip_jax.conditioning.vae_image import start_pixels
from unclip_jax.distributed.mesh import Chunk
from unclip_jax.pipelines.arguments import UpscaleArguments
from unclip_jax.pipelines.checks import check_request, check_size, check_solver, optional_array, with_inputs
from unclip_jax.pipelines.init_image import count_prompts, load_init_images
from unclip_jax.pipelines.parts import Parts, from_noise, noise_of, text_states
from unclip_jax.pipelines.pipeline import Pipeline, calls, streams
from unclip_jax.pipelines.request import Conditions, Request, Task
from unclip_jax.sampling.noise import Branch

# An image of 16,384 pixels a side is 3 GiB in float32.
LARGEST_SIDE = 4096
# Four times the area that the published network was trained on.
LARGEST_WHOLE_SIDE = 256


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What upscaling alone has.

    Attributes:
        pixels: (images, h, w, 3) in -1..1, of the latents' size.
        noise_level: (B,).
        latents: (B, h, w, 4) initial noise; low_res_noise: (B, h, w, 3). None: by the images' keys.
    """

    pixels: np.ndarray
    noise_level: np.ndarray
    latents: np.ndarray | None
    low_res_noise: np.ndarray | None


def check(config: CheckpointConfig, a: UpscaleArguments) -> Request[Inputs]:
    """Checks every argument; touches no device. Raises ValueError, FileNotFoundError."""
    multiple = config.unet.size_multiple
    pixels = [start_pixels(image, multiple=multiple, resample="bicubic") for image in load_init_images(a.image)]
    if len({array.shape for array in pixels}) > 1:
        raise ValueError("image: the images are of several sizes; want one size")
    height, width = pixels[0].shape[:2]
    shape, prompts = (height, width, config.vae.latent_channels), count_prompts(a.prompt, len(pixels))
    request = check_request(config, a, check_solver(config, a), shape, a.prompt, a.negative_prompt, prompts)
    levels = check_levels(a.noise_level, prompts, config.unet.class_embedding_size or 0)
    inputs = Inputs(
        pixels=np.stack(pixels),
        noise_level=np.repeat(levels, request.repeats),
        latents=optional_array("latents", a.latents, (request.batch, *shape)),
        low_res_noise=optional_array("low_res_noise", a.low_res_noise, (request.batch, height, width, 3)),
    )
    tile = _check_tile(config, a.tile, max(height, width))
    if tile is not None and request.deep_cache > 1:
        raise ValueError(f"deep_cache is {request.deep_cache}, and the image is made in tiles; want one of them")
    return with_inputs(request, inputs, tile=tile)


def conditions(parts: Parts, request: Request[Inputs]) -> Conditions:
    """What the denoiser is told."""
    inputs = request.inputs

    def labels(chunk: Chunk) -> jax.Array:
        return chunk.of_images(inputs.noise_level)

    def channels(chunk: Chunk) -> jax.Array:
        shape = inputs.pixels.shape[1:]
        noise = noise_of(parts, inputs.low_res_noise, Branch.LOW_RESOLUTION, shape, chunk)
        return parts.programs.noise_low_res(chunk.of_prompts(inputs.pixels), labels(chunk), noise, parts.noising)

    text, negative = text_states(parts, request)
    return Conditions(text, negative, from_noise(parts, request, inputs.latents), labels, channels)


def _check_tile(config: CheckpointConfig, tile: Any, side: int) -> tuple[int, int] | None:
    """Size and overlap of the tiles of an image whose longer side is `side`; None where it is no larger."""
    trained, multiple = config.unet.sample_size, config.unet.size_multiple
    if side > LARGEST_SIDE:
        raise ValueError(f"image has a side of {side} pixels; want at most {LARGEST_SIDE}")
    if tile is None:
        tile = side if side <= LARGEST_WHOLE_SIDE else trained
    else:
        tile = check_size("tile", tile, 2 * multiple, 0)
    # A quarter of a tile fades on each side.
    return None if tile >= side else (tile, max(multiple, tile // 4 // multiple * multiple))


class UpscalePipeline(Pipeline):
    """Makes images four times as large."""

    accepts = ("upscale",)
    diffusers_class = "StableDiffusionUpscalePipeline"
    task = Task(UpscaleArguments, check, conditions)

    @calls(UpscaleArguments)
    def __call__(self) -> Any: ...

    @streams(UpscaleArguments)
    def stream(self) -> Any: ...
