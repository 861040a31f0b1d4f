"""Image variations with Stable Diffusion 2.1 unCLIP: pictures and an optional prompt in, variations out.

pictures -> CLIP embeddings -> noised to a level (and mixed) -> class label --+
prompt   -> tokens -> text encoder ---------------------------> text states --+-> denoising loop -> VAE -> images
"""

from collections.abc import Sequence
from typing import Any

from unclip_jax.pipelines.arguments import ProjectedGuidance
from unclip_jax.pipelines.image_condition import check_condition
from unclip_jax.pipelines.pipeline import ImageInput, Pipeline, PipelineOutput
from unclip_jax.pipelines.request import OutputType, Request, check_latent_shape, check_request
from unclip_jax.sampling.solvers import Solver


class UnCLIPPipeline(Pipeline):
    """Makes variations of pictures."""

    tasks = ("variations",)
    diffusers_class = "StableUnCLIPImg2ImgPipeline"

    def __call__(
        self,
        image: ImageInput | Sequence[ImageInput] | None = None,
        prompt: str | Sequence[str] = "",
        negative_prompt: str | Sequence[str] = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: Any = 10.0,
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
        image_weights: Any = None,
        mix_noise_level: int | None = None,
        latents: Any = None,
        image_noise: Any = None,
        step_noise: Any = None,
        batch_size: int | None = None,
        output_type: OutputType = "pil",
    ) -> PipelineOutput:
        """Makes `num_images_per_prompt` variations of each picture, or of the mix of all.

        B = pictures * num_images_per_prompt, picture-major; with `image_weights`, B = num_images_per_prompt.

        image: PIL picture, path, address, bytes, uint8 (H, W, 3), float 0..1 (H, W, 3), or a list of them; or instead
        image_embeds: (pictures, D) CLIP embeddings, before noising
        height, width: in pixels, multiples of 64 (for Stable Diffusion 2); default the checkpoint's sample size
        noise_level: 0..1000, how far the embedding is from the picture's; an int or one a picture
        image_weights: one a picture: mix them all, sum(w e) / sum(w); mix_noise_level: noise the mix once more
        latents: (B, H/f, W/f, 4) initial noise, standard normal for every solver
        image_noise: (B, D) or (pictures, D), mixing (B, K, D) or (B, K + 1, D)

        The other arguments and what is raised: see `Pipeline`.
        """
        return self._make(self._check(**{k: v for k, v in locals().items() if k != "self"}))

    def _check(self, **a: Any) -> Request:
        shape = check_latent_shape(self.config, a["height"], a["width"])
        condition = check_condition(self.config, a)
        prompts = 1 if condition.weights is not None else condition.pictures
        return Request(**check_request(self.config, a, shape, prompts), condition=condition)
