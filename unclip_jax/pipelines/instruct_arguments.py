"""The arguments of changing images by instructions; those of the other tasks are in `arguments`."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

from unclip_jax.pipelines.arguments import ControlArguments
from unclip_jax.pipelines.defaults import DefaultInt

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from unclip_jax.pipelines.arguments import Images, Prompts


@dataclass(frozen=True, eq=False)
class InstructArguments(ControlArguments):
    """Makes `num_images_per_prompt` images of each image, with one instruction per image (or several for one image).

    Args:
        image: PIL image, path, address, bytes, uint8 (H, W, 3), float 0..1 (H, W, 3), or a list of them.
        prompt: the instruction, such as "make it snow"; a string, or a list of one per image.
        negative_prompt: a string, or a list of one per image.
        height, width: in pixels, multiples of 64. None: the image's own, rounded down to multiples of 64.
        image_guidance_scale: how near the result stays to the image, in the forms of `guidance_scale`. Numbers below 1
            switch both off, as in diffusers.
        latents: (B, H/f, W/f, 4) initial noise, standard normal for every solver. None: by the seed.
    """

    image: Images | None = None
    prompt: Prompts = ""
    negative_prompt: Prompts = ""
    height: int | None = None
    width: int | None = None
    _: KW_ONLY
    num_inference_steps: int = DefaultInt(100)
    image_guidance_scale: ArrayLike = 1.5
    latents: ArrayLike | None = None
