"""Image to image (SDEdit, Meng et al. 2021, arXiv:2108.01073): a picture, partly noised, is denoised to a prompt.

picture -> VAE -> latents -> noised to the level that `strength` says --+
prompt  -> text encoder ------------------------------> text states ----+-> the rest of the loop -> VAE -> images
picture -> CLIP embedding, of unCLIP checkpoints -----> class label ----+
"""

from collections.abc import Sequence
from typing import Any

from unclip_jax.pipelines.arguments import ProjectedGuidance
from unclip_jax.pipelines.image_condition import check_own_condition
from unclip_jax.pipelines.init_image import check_start, count_prompts, latent_shape_of, load_init_images, pixels_of
from unclip_jax.pipelines.pipeline import ImageInput, Pipeline, PipelineOutput
from unclip_jax.pipelines.request import OutputType, Request, check_request
from unclip_jax.sampling.solvers import Solver


class ImageToImagePipeline(Pipeline):
    """Changes pictures by prompts; with unCLIP checkpoints, variations that begin with the picture's own latents."""

    tasks = ("text-to-image", "variations")
    diffusers_class = "StableDiffusionImg2ImgPipeline"

    def __call__(
        self,
        image: ImageInput | Sequence[ImageInput] | None = None,
        prompt: str | Sequence[str] = "",
        negative_prompt: str | Sequence[str] = "",
        strength: float = 0.8,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: Any = 7.5,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        pag_scale: float = 0.0,
        projected_guidance: ProjectedGuidance | None = None,
        noise_level: int | Sequence[int] = 0,
        num_images_per_prompt: int = 1,
        scheduler: str | Solver | None = None,
        eta: float = 0.0,
        seed: int = 0,
        image_embeds: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        sample_posterior: bool = True,
        posterior_noise: Any = None,
        noise: Any = None,
        image_noise: Any = None,
        step_noise: Any = None,
        batch_size: int | None = None,
        output_type: OutputType = "pil",
    ) -> PipelineOutput:
        """Makes `num_images_per_prompt` pictures of each picture, one prompt a picture (or several for one picture).

        image: PIL picture, path, address, bytes, uint8 (H, W, 3), float 0..1 (H, W, 3), or a list of them
        strength: 0..1, the share of the steps that are run: 1 keeps next to nothing of the picture
        height, width: in pixels, multiples of 64; default the picture's own, rounded down to multiples of 64
        noise: (B, H/f, W/f, 4), added to the picture's latents
        sample_posterior: whether the encoding is drawn from the VAE's posterior, or is its mode
        posterior_noise: (B, H/f, W/f, 4) of that draw

        Of unCLIP checkpoints alone: noise_level 0..1000, image_embeds (pictures, D) in the place of the pictures' own,
        image_noise (B, D) or (pictures, D). The other arguments and what is raised: see `Pipeline`.
        """
        return self._make(self._check(**{k: v for k, v in locals().items() if k != "self"}))

    def _check(self, **a: Any) -> Request:
        a["image"] = load_init_images(a["image"])
        pixels = pixels_of(self.config, a["image"], a["height"], a["width"])
        shape, prompts = latent_shape_of(self.config, pixels), count_prompts(a, len(pixels))
        common = check_request(self.config, a, shape, prompts, a["strength"])
        return Request(
            **common,
            start=check_start(a, pixels, common["batch"], shape),
            condition=check_own_condition(self.config, a, prompts),
        )
