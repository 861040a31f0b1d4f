"""The arguments of every pipeline, with their defaults: one dataclass for what all share, and one for each task.

They are the signatures of the calls, so editors and `help` show them, and the one place where defaults are written: the
command line and the tables of the docs read them here. This module needs no JAX.
"""

from __future__ import annotations

import inspect
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from unclip_jax.pipelines.defaults import DefaultFloat, DefaultInt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike

    from unclip_jax.conditioning.clip_image import ImageSource
    from unclip_jax.pipelines.checks import ProjectedGuidance
    from unclip_jax.pipelines.controlnet import ControlNet
    from unclip_jax.pipelines.prior import TextFeatures
    from unclip_jax.sampling.solvers import Solver

    Images: TypeAlias = ImageSource | Sequence[ImageSource]
    Prompts: TypeAlias = str | Sequence[str]

OutputType = Literal["pil", "np", "latent"]
_SCALE, _UNCLIP_SCALE, _UPSCALER_SCALE = DefaultFloat(7.5), DefaultFloat(10), DefaultFloat(9)


@dataclass(frozen=True, kw_only=True, eq=False)
class CommonArguments:
    """
    Args:
        num_inference_steps: 1 to 1000. A `Solver` given as scheduler has its own, and sd-turbo's default is 1.
        guidance_scale: a number, one per step, one per image, or (network evaluations, B). sd-turbo's default is none.
        guidance_rescale: 0 to 1, how far the guided prediction gets the deviation of the conditional one.
        guidance_interval: (low, high), the noise levels with guidance, in units of sigma. None: all.
        pag_scale: of perturbed-attention guidance, 0 or more. 0: none.
        projected_guidance: a `ProjectedGuidance`. None: plain guidance.
        num_images_per_prompt: how many images are made of each prompt, or of each image; they lie side by side.
        scheduler: a name of `unclip_jax.sampling.SCHEDULERS`, or a `Solver`. None: the checkpoint's own.
        eta: 0 to 1, how stochastic DDIM is. None: 0, or what the `Solver` has.
        seed: 0 to 2**32 - 1. The noise of image i comes from (seed, i) alone. Or a list of one per prompt, or per image
            given: the noise of its image number i comes from (its seed, i).
        prompt_embeds: (1 or prompts, T, C) states of the text encoder, instead of `prompt`.
        negative_prompt_embeds: the same, instead of `negative_prompt`.
        step_noise: (network evaluations, B, H/f, W/f, 4) for stochastic solvers. None: by the seed.
        deep_cache: the whole UNet runs every so many evaluations, its outer layers alone between them. 1: always.
        batch_size: images per compiled call. None: all at once.
        output_type: "pil"; "np", (B, H, W, 3) float32 in 0..1; or "latent".
    """

    num_inference_steps: int = DefaultInt(50)
    guidance_scale: ArrayLike = _SCALE
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    pag_scale: float = 0.0
    projected_guidance: ProjectedGuidance | None = None
    num_images_per_prompt: int = 1
    scheduler: str | Solver | None = None
    eta: float | None = None
    seed: int | Sequence[int] = 0
    prompt_embeds: ArrayLike | None = None
    negative_prompt_embeds: ArrayLike | None = None
    step_noise: ArrayLike | None = None
    deep_cache: int = 1
    batch_size: int | None = None
    output_type: OutputType = "pil"


@dataclass(frozen=True, kw_only=True, eq=False)
class ControlArguments(CommonArguments):
    """
    Args:
        controlnet: a `ControlNet` for the checkpoint's base, or a list of several, whose effects add up.
        control_image: what it reads, of the size of the image: one, or a list of one for each prompt or image given.
            With a list of ControlNets a list of one of these for each; and so with the numbers below.
        controlnet_conditioning_scale: how much it adds.
        control_guidance_start, control_guidance_end: 0 to 1, the share of the steps after which it begins and ends.
        guess_mode: adds to the rows with conditions alone, and the less the finer the features are.
    """

    controlnet: ControlNet | Sequence[ControlNet] | None = None
    control_image: Any = None
    controlnet_conditioning_scale: float | Sequence[float] = 1.0
    control_guidance_start: float | Sequence[float] = 0.0
    control_guidance_end: float | Sequence[float] = 1.0
    guess_mode: bool = False


@dataclass(frozen=True, eq=False)
class TextToImageArguments(ControlArguments):
    """Makes `num_images_per_prompt` images of each prompt. B = prompts * num_images_per_prompt, prompt by prompt.

    Args:
        prompt, negative_prompt: a string, or a list of one per image.
        height, width: in pixels, multiples of 64 (for Stable Diffusion 2). None: the checkpoint's own size.
        latents: (B, H/f, W/f, 4) initial noise, standard normal for every solver. None: by the seed.
    """

    prompt: Prompts = ""
    negative_prompt: Prompts = ""
    height: int | None = None
    width: int | None = None
    _: KW_ONLY
    latents: ArrayLike | None = None


@dataclass(frozen=True, eq=False)
class UnCLIPArguments(ControlArguments):
    """Makes `num_images_per_prompt` variations of each image, or of the mix of all.

    B = images * num_images_per_prompt, image by image; with `image_weights`, B = num_images_per_prompt.

    Args:
        image: PIL image, path, address, bytes, uint8 (H, W, 3), float 0..1 (H, W, 3), or a list of them.
        prompt, negative_prompt: a string, or a list of one per image.
        height, width: in pixels, multiples of 64 (for Stable Diffusion 2). None: the checkpoint's own size.
        noise_level: 0 to 1000, how much noise the image's embedding gets; an integer, or one per image.
        image_embeds: (images, D) CLIP embeddings before noising, instead of `image`.
        image_weights: one per image, to mix all images: sum(w e) / sum(w).
        mix_noise_level: 0 to 1000, noises the mix once more.
        image_noise: (B, D) or (images, D); of a mix (B, K, D) or (B, K + 1, D). None: by the seed.
        latents: (B, H/f, W/f, 4) initial noise, standard normal for every solver. None: by the seed.
    """

    image: Images | None = None
    prompt: Prompts = ""
    negative_prompt: Prompts = ""
    height: int | None = None
    width: int | None = None
    _: KW_ONLY
    num_inference_steps: int = DefaultInt(20)
    guidance_scale: ArrayLike = _UNCLIP_SCALE
    noise_level: int | Sequence[int] = 0
    image_embeds: ArrayLike | None = None
    image_weights: ArrayLike | None = None
    mix_noise_level: int | None = None
    image_noise: ArrayLike | None = None
    latents: ArrayLike | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class InitImageArguments(ControlArguments):
    """
    Args:
        strength: 0 to 1, the share of the steps that are run: 1 keeps next to nothing of the image.
        height, width: in pixels, multiples of 64. None: the image's own, rounded down to multiples of 64.
        sample_posterior: whether the image's latents are drawn from the VAE's posterior, or are its mode.
        posterior_noise: (B, H/f, W/f, 4) of that draw. None: by the seed.
        noise: (B, H/f, W/f, 4), added to the image's latents. None: by the seed.
    """

    strength: float = DefaultFloat(0.8)
    height: int | None = None
    width: int | None = None
    sample_posterior: bool = True
    posterior_noise: ArrayLike | None = None
    noise: ArrayLike | None = None
    controlnet_conditioning_scale: float | Sequence[float] = 0.8


@dataclass(frozen=True, eq=False)
class ImageToImageArguments(InitImageArguments):
    """Makes `num_images_per_prompt` images of each image, with one prompt per image (or several for one image).

    Args:
        image: PIL image, path, address, bytes, uint8 (H, W, 3), float 0..1 (H, W, 3), or a list of them.
        prompt, negative_prompt: a string, or a list of one per image.
        noise_level: 0 to 1000, of unCLIP checkpoints alone, as for variations.
        image_embeds: (images, D), of unCLIP checkpoints alone, instead of the images' own embeddings.
        image_noise: (B, D) or (images, D), of unCLIP checkpoints alone. None: by the seed.
    """

    image: Images | None = None
    prompt: Prompts = ""
    negative_prompt: Prompts = ""
    _: KW_ONLY
    noise_level: int | Sequence[int] = 0
    image_embeds: ArrayLike | None = None
    image_noise: ArrayLike | None = None


@dataclass(frozen=True, eq=False)
class DepthToImageArguments(InitImageArguments):
    """Makes `num_images_per_prompt` images of each image, with one prompt per image (or several for one image).

    Args:
        image: PIL image, path, address, bytes, uint8 (H, W, 3), float 0..1 (H, W, 3), or a list of them.
        prompt, negative_prompt: a string, or a list of one per image.
        depth_map: (H, W) of any size and range, larger is nearer, or a gray image; one for all images, or a list of one
            per image. None: estimated. A checkpoint without a depth estimator needs it.
    """

    image: Images | None = None
    prompt: Prompts = ""
    negative_prompt: Prompts = ""
    _: KW_ONLY
    depth_map: Any = None


@dataclass(frozen=True, eq=False)
class InpaintArguments(InitImageArguments):
    """Makes `num_images_per_prompt` images of each image, with one prompt per image (or several for one image).

    Args:
        image: PIL image, path, address, bytes, uint8 (H, W, 3), float 0..1 (H, W, 3), or a list of them.
        mask_image: the same in gray, one for all images or one per image; white pixels are repainted.
        prompt, negative_prompt: a string, or a list of one per image.
        strength: 0 to 1. At 1 the run begins with pure noise; below it with the image, as in image to image.
        padding_mask_crop: repaints only the part around the mask and this many pixels more, at full size.
        paste_back: whether black pixels of the mask are copied from the image, bit for bit (always with
            `padding_mask_crop`).
        latents: (B, H/f, W/f, 4) initial noise at strength 1; below 1 it is `noise`. None: by the seed.
        posterior_noise: also (2, B, H/f, W/f, 4), of the image and of the image without the hole.
        condition_image: the image that guides an unCLIP checkpoint. None: `image`.
        noise_level, image_embeds, image_noise: of unCLIP checkpoints alone, as for image to image.
    """

    image: Images | None = None
    mask_image: Images | None = None
    prompt: Prompts = ""
    negative_prompt: Prompts = ""
    _: KW_ONLY
    strength: float = DefaultFloat(1.0)
    controlnet_conditioning_scale: float | Sequence[float] = 0.5
    padding_mask_crop: int | None = None
    paste_back: bool = False
    latents: ArrayLike | None = None
    condition_image: Images | None = None
    noise_level: int | Sequence[int] = 0
    image_embeds: ArrayLike | None = None
    image_noise: ArrayLike | None = None


@dataclass(frozen=True, eq=False)
class UpscaleArguments(CommonArguments):
    """Makes `num_images_per_prompt` images of each image, with one prompt per image (or several for one image).

    Args:
        image: PIL image, path, address, bytes, uint8 (h, w, 3), float 0..1 (h, w, 3), or a list of them of one size.
            Sides are rounded down to multiples of 8.
        prompt, negative_prompt: a string, or a list of one per image.
        noise_level: 0 to 350, how much noise the small image gets; an integer, or one per image. More leaves more to
            invent.
        tile: pixels of the small image along a tile's side, a multiple of 16. The UNet then sees overlapping tiles,
            whose predictions are averaged at every step. None: no tiles up to 256x256, above it tiles of the side that
            the checkpoint was trained at. Tiles are decoded in diffusers' way, unless the pipeline's `Memory` has
            another.
        latents: (B, h, w, 4) initial noise, standard normal for every solver. None: by the seed.
        low_res_noise: (B, h, w, 3). None: by the seed.
    """

    image: Images | None = None
    prompt: Prompts = ""
    negative_prompt: Prompts = ""
    _: KW_ONLY
    num_inference_steps: int = DefaultInt(75)
    guidance_scale: ArrayLike = _UPSCALER_SCALE
    noise_level: int | Sequence[int] = 20
    tile: int | None = None
    latents: ArrayLike | None = None
    low_res_noise: ArrayLike | None = None


@dataclass(frozen=True, eq=False)
class StableUnCLIPArguments(ControlArguments):
    """Makes `num_images_per_prompt` images of each prompt. Every image has an embedding of its own, from the prior.

    B = prompts * num_images_per_prompt, prompt by prompt. The prior reads `prompt` alone.

    Args:
        prompt, negative_prompt: a string, or a list of one per image.
        height, width: in pixels, multiples of 64 (for Stable Diffusion 2). None: the checkpoint's own size.
        noise_level: 0 to 1000, how much noise the embeddings get.
        prior_num_inference_steps, prior_guidance_scale, prior_latents, prior_step_noise: of `TextToEmbeddingPrior`.
        image_noise: (B, D). None: by the seed.
        latents: (B, H/f, W/f, 4) initial noise, standard normal for every solver. None: by the seed.
    """

    prompt: Prompts = ""
    negative_prompt: Prompts = ""
    height: int | None = None
    width: int | None = None
    _: KW_ONLY
    num_inference_steps: int = DefaultInt(20)
    guidance_scale: ArrayLike = _UNCLIP_SCALE
    noise_level: int = 0
    prior_num_inference_steps: int = 25
    prior_guidance_scale: float = 4.0
    prior_latents: ArrayLike | None = None
    prior_step_noise: ArrayLike | None = None
    image_noise: ArrayLike | None = None
    latents: ArrayLike | None = None


@dataclass(frozen=True, eq=False)
class PriorArguments:
    """Image embeddings of `num_images_per_prompt` images of each prompt: (B, D) float32, un-normalised.

    B = prompts * num_images_per_prompt, prompt by prompt. The network predicts the clean embedding; guidance is against
    the empty prompt, and the result is clipped as the scheduler says.

    Args:
        prompt: a string, or a list of them.
        num_images_per_prompt: how many embeddings are made of each.
        prior_num_inference_steps: 2 to 1000 (1 with schedulers that allow it).
        prior_guidance_scale: off at exactly 1 in Karlo's own checkpoints, at 1 and below in diffusers' folders.
        prior_latents: (B, D) initial noise, standard normal. None: by the seed.
        prior_step_noise: (network evaluations, B, D), the noise of each step; that of the last is not used. None: by
            the seed.
        seed: 0 to 2**32 - 1. The noise of embedding i comes from (seed, i) alone. Or a list of one per prompt, as for
            images.
        text_features: of P prompts, as `encode_prompts` gives them, instead of `prompt`.
        negative_text_features: what guidance leads away from, one row or P. None: the empty prompt's.
        batch_size: embeddings per compiled call. None: all at once.
    """

    prompt: Prompts | None = None
    num_images_per_prompt: int = 1
    prior_num_inference_steps: int = 25
    prior_guidance_scale: float = 4.0
    prior_latents: ArrayLike | None = None
    prior_step_noise: ArrayLike | None = None
    seed: int | Sequence[int] = 0
    text_features: TextFeatures | None = None
    negative_text_features: TextFeatures | None = None
    batch_size: int | None = None


def described(arguments: type) -> str:
    """The docstring of a call with these arguments: what it does, then every argument, those of the task first."""
    parts = [inspect.cleandoc(cls.__doc__ or "").partition("Args:") for cls in arguments.__mro__[:-1]]
    args = "".join(text.rstrip() for _, _, text in parts)
    return f"{parts[0][0]}Args:{args}\n\nRaises:\n    ValueError, FileNotFoundError: before anything is compiled."


def signed(function: Any, arguments: Any, first: str) -> Any:
    """A method with the signature of `arguments`, and its documentation below `first`."""
    own = inspect.signature(arguments).parameters.values()
    me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    function.__signature__ = inspect.Signature([me, *own], return_annotation=function.__annotations__["return"])
    function.__doc__ = first + described(arguments)
    return function
