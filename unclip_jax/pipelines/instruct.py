"""Changing images by instructions (InstructPix2Pix; Brooks et al. 2022, arXiv:2211.09800).

image       -> VAE -> latents, unscaled -> four channels beside the latents --+
instruction -> text encoder ------------> text states ------------------------+-> denoising loop -> VAE -> images
"""

import dataclasses
from typing import Any

import numpy as np

from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.pipelines.checks import check_request, check_solver, optional_array, with_inputs
from unclip_jax.pipelines.init_image import count_prompts, latent_shape_of, load_init_images, resize_images
from unclip_jax.pipelines.instruct_arguments import InstructArguments
from unclip_jax.pipelines.parts import Parts, from_noise, text_states, vae_encode
from unclip_jax.pipelines.pipeline import Pipeline, calls, streams
from unclip_jax.pipelines.request import Conditions, Request, Task


@dataclasses.dataclass(frozen=True)
class Inputs:
    """pixels: (images, H, W, 3) in -1..1. latents: (B, h, w, 4) initial noise; None: by the images' keys."""

    pixels: np.ndarray
    latents: np.ndarray | None


def check(config: CheckpointConfig, a: InstructArguments) -> Request[Inputs]:
    """Checks every argument; touches no device. Raises ValueError, FileNotFoundError."""
    pixels = resize_images(config, load_init_images(a.image), a.height, a.width)
    shape, prompts = latent_shape_of(config, pixels), count_prompts(a.prompt, len(pixels))
    request = check_request(config, a, check_solver(config, a), shape, a.prompt, a.negative_prompt, prompts)
    return with_inputs(request, Inputs(pixels, optional_array("latents", a.latents, (request.batch, *shape))))


def conditions(parts: Parts, request: Request[Inputs]) -> Conditions:
    """What the denoiser is told."""
    # The posterior's mode, without the VAE's factor that the latents beside it have.
    image = vae_encode(parts, request.inputs.pixels)[..., : request.latent_shape[-1]]
    text, negative = text_states(parts, request)
    start = from_noise(parts, request, request.inputs.latents)
    return Conditions(text, negative, start, channels=lambda chunk: chunk.of_prompts(image))


class InstructPipeline(Pipeline):
    """Changes images by instructions."""

    accepts = ("instruct",)
    diffusers_class = "StableDiffusionInstructPix2PixPipeline"
    task = Task(InstructArguments, check, conditions)

    @calls(InstructArguments)
    def __call__(self) -> Any: ...

    @streams(InstructArguments)
    def stream(self) -> Any: ...
