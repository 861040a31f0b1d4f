"""Image to image (SDEdit, Meng et al. 2021, arXiv:2108.01073): an image, partly noised, is denoised to a prompt.

image  -> VAE -> latents -> noised to the level of `strength` --+
prompt -> text encoder ----------------------> text states -----+-> the rest of the loop -> VAE -> images
image  -> CLIP embedding, of unCLIP checkpoints -> class labels +
"""

import dataclasses
from typing import Any

from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.pipelines.arguments import ImageToImageArguments
from unclip_jax.pipelines.checks import check_request, check_solver, with_inputs
from unclip_jax.pipelines.init_image import (
    InitImage,
    check_init,
    count_prompts,
    from_image,
    latent_shape_of,
    load_init_images,
    resize_images,
)
from unclip_jax.pipelines.parts import Parts, text_states, vae_encode
from unclip_jax.pipelines.pipeline import Pipeline, calls, streams
from unclip_jax.pipelines.request import Conditions, Request, Task
from unclip_jax.pipelines.unclip import ImageCondition, check_own_condition, image_labels


@dataclasses.dataclass(frozen=True)
class Inputs:
    """condition: of unCLIP checkpoints."""

    init: InitImage
    condition: ImageCondition | None


def check(config: CheckpointConfig, a: ImageToImageArguments) -> Request[Inputs]:
    """Checks every argument; touches no device. Raises ValueError, FileNotFoundError."""
    images = load_init_images(a.image)
    pixels = resize_images(config, images, a.height, a.width)
    shape, prompts = latent_shape_of(config, pixels), count_prompts(a.prompt, len(pixels))
    solver = check_solver(config, a, a.strength)
    request = check_request(config, a, solver, shape, a.prompt, a.negative_prompt, prompts)
    inputs = Inputs(check_init(config, a, pixels, request), check_own_condition(config, a, images, prompts))
    return with_inputs(request, inputs)


def conditions(parts: Parts, request: Request[Inputs]) -> Conditions:
    """What the denoiser is told."""
    init, condition = request.inputs.init, request.inputs.condition
    moments = vae_encode(parts, init.pixels)
    embeds, labels = (None, None) if condition is None else image_labels(parts, condition)
    text, negative = text_states(parts, request)
    start = from_image(parts, request, init, moments)
    return Conditions(text, negative, start, labels, image_embeds=embeds)


class ImageToImagePipeline(Pipeline):
    """Changes images by prompts; with unCLIP checkpoints, variations that begin with the image's own latents."""

    accepts = ("text-to-image", "variations")
    diffusers_class = "StableDiffusionImg2ImgPipeline"
    task = Task(ImageToImageArguments, check, conditions)

    @calls(ImageToImageArguments)
    def __call__(self) -> Any: ...

    @streams(ImageToImageArguments)
    def stream(self) -> Any: ...
