"""Upscaling by four: a small picture, noised a little, is a part of what the UNet reads.

small picture -> noised to `noise_level` ----------> three channels beside the latents --+
noise_level   -> class label ------------------------------------------------------------+-> loop -> VAE -> images
prompt        -> text encoder ---------------------> text states ------------------------+
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from unclip_jax.conditioning.upscale import check_levels
from unclip_jax.conditioning.vae_image import start_pixels
from unclip_jax.pipelines import arguments as check
from unclip_jax.pipelines.arguments import ProjectedGuidance
from unclip_jax.pipelines.init_image import count_prompts, load_init_images
from unclip_jax.pipelines.pipeline import Chunk, ImageInput, Pipeline, PipelineOutput
from unclip_jax.pipelines.request import OutputType, Request, check_request
from unclip_jax.sampling.noise import Branch
from unclip_jax.sampling.solvers import Solver

# A picture of 16,384 pixels a side is 3 GiB in float32.
LARGEST_SIDE = 4096
# Four times the area that the published network was trained on.
LARGEST_WHOLE_SIDE = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpscaleRequest(Request):
    """pixels: (pictures, h, w, 3) in -1..1, at the latents' size. noise_level: (B,). low_res_noise: (B, h, w, 3)."""

    pixels: np.ndarray
    noise_level: np.ndarray
    low_res_noise: np.ndarray | None


class UpscalePipeline(Pipeline):
    """Makes pictures four times as large."""

    tasks = ("upscale",)
    diffusers_class = "StableDiffusionUpscalePipeline"

    def __call__(
        self,
        image: ImageInput | Sequence[ImageInput] | None = None,
        prompt: str | Sequence[str] = "",
        negative_prompt: str | Sequence[str] = "",
        noise_level: int | Sequence[int] = 20,
        num_inference_steps: int = 75,
        guidance_scale: Any = 9.0,
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
        low_res_noise: Any = None,
        tile: int | None = None,
        step_noise: Any = None,
        batch_size: int | None = None,
        output_type: OutputType = "pil",
    ) -> PipelineOutput:
        """Makes `num_images_per_prompt` pictures of each picture, one prompt a picture (or several for one picture).

        image: PIL picture, path, address, bytes, uint8 (h, w, 3), float 0..1 (h, w, 3), or a list of them of one size;
            sides are rounded down to multiples of 8
        noise_level: 0..350, how much noise the small picture gets, an int or one a picture: more leaves more to invent
        tile: pixels of the small picture along a tile's side, a multiple of 16; the UNet then sees overlapping tiles,
            whose predictions are averaged at every step. None: no tiles up to 256x256, and for larger pictures tiles
            of the side that the checkpoint was trained at. They are decoded in diffusers' way, unless the
            pipeline's `Memory` says another.
        latents: (B, h, w, 4) initial noise, standard normal for every solver; low_res_noise: (B, h, w, 3)

        The other arguments and what is raised: see `Pipeline`.
        """
        return self._make(self._check(**{k: v for k, v in locals().items() if k != "self"}))

    def _check(self, **a: Any) -> UpscaleRequest:
        multiple = self.config.unet.size_multiple
        pixels = [start_pixels(p, multiple=multiple, resample="bicubic") for p in load_init_images(a["image"])]
        if len({array.shape for array in pixels}) > 1:
            raise ValueError("image: the pictures are of several sizes; want one size")
        height, width = pixels[0].shape[:2]
        shape, prompts = (height, width, self.config.vae.latent_channels), count_prompts(a, len(pixels))
        common = check_request(self.config, a, shape, prompts)
        noise = a["low_res_noise"]
        if noise is not None:
            noise = check.check_array("low_res_noise", noise, (common["batch"], height, width, 3))
        levels = check_levels(a["noise_level"], prompts, self.config.unet.class_embedding_size or 0)
        return UpscaleRequest(
            **common,
            tile=self._check_tile(a["tile"], max(height, width)),
            pixels=np.stack(pixels),
            noise_level=np.repeat(levels, common["repeats"]),
            low_res_noise=noise,
        )

    def _check_tile(self, tile: Any, side: int) -> tuple[int, int] | None:
        """Size and overlap of the tiles of a picture whose longer side is `side`; None where it is no larger."""
        trained, multiple = self.config.unet.sample_size, self.config.unet.size_multiple
        if side > LARGEST_SIDE:
            raise ValueError(f"image has a side of {side} pixels; want at most {LARGEST_SIDE}")
        if tile is None:
            tile = side if side <= LARGEST_WHOLE_SIDE else trained
        else:
            tile = check.check_size("tile", tile, 2 * multiple, 0)
        # A quarter of a tile fades on each side.
        return None if tile >= side else (tile, max(multiple, tile // 4 // multiple * multiple))

    def _labels(self, request: Request, encoded: Mapping[str, np.ndarray], chunk: Chunk) -> jax.Array | None:
        assert isinstance(request, UpscaleRequest)
        return chunk.split(request.noise_level[chunk.rows])

    def _channels(self, request: Request, encoded: Mapping[str, np.ndarray], chunk: Chunk) -> jax.Array | None:
        assert isinstance(request, UpscaleRequest)
        pixels = chunk.of_prompts(request.pixels)
        noise = self._noise(request.low_res_noise, Branch.LOW_RESOLUTION, pixels.shape[1:], chunk)
        levels = chunk.split(request.noise_level[chunk.rows])
        return self.programs.noise_low_res(chunk.split(pixels), levels, noise, **self._noising)
