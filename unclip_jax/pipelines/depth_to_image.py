"""Depth to image: a picture is denoised to a prompt and keeps its depth.

picture -> depth estimator -> depth map, stretched to -1..1 -> a channel beside the latents --+
picture -> VAE -> latents -> noised to the level that `strength` says ------------------------+-> loop -> VAE -> images
prompt  -> text encoder ------------------------------> text states --------------------------+
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from unclip_jax.conditioning.depth import estimator_pixels, load_depth_map
from unclip_jax.conditioning.vae_image import Resample
from unclip_jax.pipelines.arguments import ProjectedGuidance
from unclip_jax.pipelines.init_image import check_start, count_prompts, latent_shape_of, load_init_images, pixels_of
from unclip_jax.pipelines.pipeline import Chunk, ImageInput, Pipeline, PipelineOutput
from unclip_jax.pipelines.request import OutputType, Request, check_request, follows_original
from unclip_jax.sampling.solvers import Solver


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthRequest(Request):
    """views: what the estimator reads, (1, h, w, 3) a picture, or depth_maps: (h, w) a picture, that are given."""

    views: list[np.ndarray] | None
    depth_maps: list[np.ndarray] | None


class DepthToImagePipeline(Pipeline):
    """Changes pictures by prompts and keeps their depth."""

    tasks = ("depth-to-image",)
    diffusers_class = "StableDiffusionDepth2ImgPipeline"

    def __call__(
        self,
        image: ImageInput | Sequence[ImageInput] | None = None,
        prompt: str | Sequence[str] = "",
        negative_prompt: str | Sequence[str] = "",
        depth_map: Any = None,
        strength: float = 0.8,
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
        sample_posterior: bool = True,
        posterior_noise: Any = None,
        noise: Any = None,
        step_noise: Any = None,
        batch_size: int | None = None,
        output_type: OutputType = "pil",
    ) -> PipelineOutput:
        """Makes `num_images_per_prompt` pictures of each picture, one prompt a picture (or several for one picture).

        image: PIL picture, path, address, bytes, uint8 (H, W, 3), float 0..1 (H, W, 3), or a list of them
        depth_map: in the place of the estimator's: (H, W) of any size and range, larger is nearer, or a gray picture;
            one for all, or a list of one a picture. A checkpoint without the estimator needs it.
        strength: 0..1, the share of the steps that are run: 1 keeps nothing of the picture but its depth
        height, width: in pixels, multiples of 64; default the picture's own, rounded down to multiples of 64
        noise: (B, H/f, W/f, 4), added to the picture's latents
        sample_posterior: whether the encoding is drawn from the VAE's posterior, or is its mode
        posterior_noise: (B, H/f, W/f, 4) of that draw

        The other arguments and what is raised: see `Pipeline`.
        """
        return self._make(self._check(**{k: v for k, v in locals().items() if k != "self"}))

    def _check(self, **a: Any) -> DepthRequest:
        config, original = self.config, follows_original(self.config, a)
        pictures = load_init_images(a["image"])
        resample: Resample = "bicubic" if original else "lanczos"
        pixels = pixels_of(config, pictures, a["height"], a["width"], resample)
        shape, prompts = latent_shape_of(config, pixels), count_prompts(a, len(pixels))
        common = check_request(config, a, shape, prompts, a["strength"], depth=True)
        if original and a["strength"] == 1:
            # The original's demo begins with pure noise then, not with the picture noised as far as its grid goes.
            common["solver"] = dataclasses.replace(common["solver"], start_alpha_cumprod=np.float32(0))
        views, maps = None, None
        if a["depth_map"] is not None:
            if isinstance(a["depth_map"], list | tuple):
                maps = [load_depth_map(depth) for depth in a["depth_map"]]
            else:
                maps = [load_depth_map(a["depth_map"])] * len(pictures)
            if len(maps) != len(pictures):
                raise ValueError(f"depth_map has {len(maps)} maps, image {len(pictures)} pictures; want one for each")
        elif config.depth_estimator is None:
            raise ValueError("depth_map is missing, and this checkpoint has no depth estimator to make one")
        else:
            side = config.depth_estimator.image_size
            looked_at = [(array + 1) / 2 for array in pixels] if original else pictures
            dialect: Any = "original" if original else "diffusers"
            views = [estimator_pixels(picture, dialect, side)[None] for picture in looked_at]
        return DepthRequest(
            **common,
            start=check_start(a, pixels, common["batch"], shape),
            views=views,
            depth_maps=maps,
        )

    def _encode(self, request: Request) -> dict[str, np.ndarray]:
        assert isinstance(request, DepthRequest)
        height, width, _ = request.latent_shape
        maps = request.depth_maps or [
            self._one_by_one("depth_estimator", self.programs.estimate_depth, view, "estimating depth")[0]
            for view in request.views or []
        ]
        conditions = [np.asarray(self.programs.depth_condition(depth[None], height, width)) for depth in maps]
        return {"depth": np.concatenate(conditions), **super()._encode(request)}

    def _channels(self, request: Request, encoded: Mapping[str, np.ndarray], chunk: Chunk) -> jax.Array | None:
        return chunk.split(chunk.of_prompts(encoded["depth"]))
