"""Text to image with Stable Diffusion 2: prompts in, images out.

prompt -> tokens -> text encoder -> text states -> denoising loop -> VAE -> images
"""

import dataclasses
from typing import Any

import numpy as np

from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.pipelines.arguments import TextToImageArguments
from unclip_jax.pipelines.checks import check_latent_shape, check_request, check_solver, optional_array, with_inputs
from unclip_jax.pipelines.parts import Parts, from_noise, text_states
from unclip_jax.pipelines.pipeline import Pipeline, calls, streams
from unclip_jax.pipelines.request import Conditions, Request, Task


@dataclasses.dataclass(frozen=True)
class Inputs:
    """latents: (B, h, w, 4) initial noise; None: by the images' keys."""

    latents: np.ndarray | None


def check(config: CheckpointConfig, a: TextToImageArguments) -> Request[Inputs]:
    """Checks every argument; touches no device. Raises ValueError."""
    shape = check_latent_shape(config, a.height, a.width)
    request = check_request(config, a, check_solver(config, a), shape, a.prompt, a.negative_prompt)
    return with_inputs(request, Inputs(optional_array("latents", a.latents, (request.batch, *shape))))


def conditions(parts: Parts, request: Request[Inputs]) -> Conditions:
    """What the denoiser is told."""
    text, negative = text_states(parts, request)
    return Conditions(text, negative, from_noise(parts, request, request.inputs.latents))


class TextToImagePipeline(Pipeline):
    """Makes images of prompts, with checkpoints that predict the noise (512-base) or v (768-v)."""

    accepts = ("text-to-image",)
    diffusers_class = "StableDiffusionPipeline"
    task = Task(TextToImageArguments, check, conditions)

    @calls(TextToImageArguments)
    def __call__(self) -> Any: ...

    @streams(TextToImageArguments)
    def stream(self) -> Any: ...
