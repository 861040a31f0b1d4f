"""Text to image with Stable Diffusion 2: prompts in, pictures out.

prompt -> tokens -> text encoder -> text states -> denoising loop -> VAE -> images
"""

from collections.abc import Sequence
from typing import Any

from unclip_jax.pipelines.arguments import ProjectedGuidance
from unclip_jax.pipelines.pipeline import Pipeline, PipelineOutput
from unclip_jax.pipelines.request import OutputType, Request, check_latent_shape, check_request
from unclip_jax.sampling.solvers import Solver


class TextToImagePipeline(Pipeline):
    """Makes pictures of prompts, with checkpoints that predict the noise (512-base) or v (768-v)."""

    tasks = ("text-to-image",)
    diffusers_class = "StableDiffusionPipeline"

    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        negative_prompt: str | Sequence[str] = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: Any = 7.5,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        pag_scale: float = 0.0,
        projected_guidance: ProjectedGuidance | None = None,
        num_images_per_prompt: int = 1,
        scheduler: str | Solver | None = None,
        eta: float = 0.0,
        seed: int = 0,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        latents: Any = None,
        step_noise: Any = None,
        batch_size: int | None = None,
        output_type: OutputType = "pil",
    ) -> PipelineOutput:
        """Makes `num_images_per_prompt` pictures of each prompt.

        height, width: in pixels, multiples of 64 (for Stable Diffusion 2); default the checkpoint's sample size
        latents: (B, H/f, W/f, 4) initial noise, standard normal for every solver

        The other arguments and what is raised: see `Pipeline`.
        """
        return self._make(self._check(**{k: v for k, v in locals().items() if k != "self"}))

    def _check(self, **a: Any) -> Request:
        shape = check_latent_shape(self.config, a["height"], a["width"])
        return Request(**check_request(self.config, a, shape))
