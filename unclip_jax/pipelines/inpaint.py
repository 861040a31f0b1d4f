"""Inpainting: what is white in a mask is painted anew, to a prompt.

picture without the hole -> VAE -> latents, with the mask: five channels that the UNet of 512-inpainting reads; or
picture -> VAE -> latents, noised to each step's level and put back around the hole: any model of four channels
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from unclip_jax.conditioning.crop import Box, crop_region, cropped_mask, cropped_pixels, paste_back
from unclip_jax.conditioning.masks import Mask, binary_mask, check_same_size, latent_mask, load_mask, masked_image
from unclip_jax.conditioning.vae_image import Resample, floor_size
from unclip_jax.pipelines.arguments import ProjectedGuidance, check_number
from unclip_jax.pipelines.compiled import Known
from unclip_jax.pipelines.image_condition import check_own_condition
from unclip_jax.pipelines.init_image import check_start, count_prompts, latent_shape_of, load_init_images, pixels_of
from unclip_jax.pipelines.pipeline import Chunk, ImageInput, Pipeline, PipelineOutput
from unclip_jax.pipelines.request import OutputType, Request, check_latent_shape, check_request, follows_original
from unclip_jax.sampling.loop import Carry
from unclip_jax.sampling.noise import Branch
from unclip_jax.sampling.solvers import Solver


@dataclasses.dataclass(frozen=True, kw_only=True)
class InpaintRequest(Request):
    """mask: (pictures, h, w, 1) of 0 and 1 on the latents' grid, 1 = repaint. masked: (pictures, H, W, 3) in -1..1.

    from_noise: whether the run begins with pure noise, or with the pictures. kept: what is pasted back, a picture
    (H, W, 3) uint8, its mask and the part that was cut out, each; None: nothing.
    """

    mask: np.ndarray
    masked: np.ndarray | None
    from_noise: bool
    kept: list[tuple[np.ndarray, Mask, Box | None]] | None

    @property
    def encodes_image(self) -> bool:
        """Whether the picture itself is encoded: to begin with it, or to put it back around the hole."""
        return self.masked is None or not self.from_noise


class InpaintPipeline(Pipeline):
    """Repaints the white part of a mask; with unCLIP checkpoints, guided by a picture."""

    tasks = ("inpaint", "text-to-image", "variations")
    diffusers_class = "StableDiffusionInpaintPipeline"

    def __call__(
        self,
        image: ImageInput | Sequence[ImageInput] | None = None,
        mask_image: ImageInput | Sequence[ImageInput] | None = None,
        prompt: str | Sequence[str] = "",
        negative_prompt: str | Sequence[str] = "",
        strength: float = 1.0,
        padding_mask_crop: int | None = None,
        paste_back: bool = False,
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
        condition_image: ImageInput | Sequence[ImageInput] | None = None,
        image_embeds: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        sample_posterior: bool = True,
        posterior_noise: Any = None,
        latents: Any = None,
        noise: Any = None,
        image_noise: Any = None,
        step_noise: Any = None,
        batch_size: int | None = None,
        output_type: OutputType = "pil",
    ) -> PipelineOutput:
        """Makes `num_images_per_prompt` pictures of each picture, one prompt a picture (or several for one picture).

        image: PIL picture, path, address, bytes, uint8 (H, W, 3), float 0..1 (H, W, 3), or a list of them
        mask_image: the same in gray, one for all or one a picture: white is repainted
        strength: 0..1; at 1 the run begins with pure noise, below it with the picture, as image to image does
        padding_mask_crop: only the part around the mask, with so many pixels around it, is repainted, at full size
        paste_back: what is black in the mask is taken from the picture, bit for bit (always with `padding_mask_crop`)
        height, width: in pixels, multiples of 64; default the picture's own, rounded down to multiples of 64
        latents: (B, H/f, W/f, 4) initial noise at strength 1; noise: the same, added to the picture, below 1
        sample_posterior: whether encodings are drawn from the VAE's posterior, or are its mode
        posterior_noise: (B, H/f, W/f, 4) of these draws; or (2, B, ...), of the picture and of the one without the hole

        Of unCLIP checkpoints alone: condition_image, the picture that guides (default `image`), or image_embeds
        (pictures, D); noise_level 0..1000; image_noise (B, D) or (pictures, D). The other arguments and what is raised:
        see `Pipeline`.
        """
        return self._make(self._check(**{k: v for k, v in locals().items() if k != "self"}))

    def _check(self, **a: Any) -> InpaintRequest:
        config = self.config
        if a["mask_image"] is None:
            raise ValueError("mask_image is missing: white is what is painted anew")
        if not isinstance(a["paste_back"], bool):
            raise ValueError(f"paste_back is {a['paste_back']!r}; want True or False")
        pictures = a["image"] = load_init_images(a["image"])
        if isinstance(a["mask_image"], list | tuple):
            masks = [load_mask(mask) for mask in a["mask_image"]]
        else:
            masks = [load_mask(a["mask_image"])] * len(pictures)
        if len(masks) != len(pictures):
            raise ValueError(
                f"mask_image has {len(masks)} masks; there are {len(pictures)} pictures, want one for each"
            )
        original = follows_original(config, a)
        resample: Resample = "bicubic" if original else "lanczos"
        crop, keeps = a["padding_mask_crop"], a["paste_back"] or a["padding_mask_crop"] is not None
        if original or keeps:
            for mask, picture in zip(masks, pictures, strict=True):
                check_same_size(mask, picture)
        if keeps and a["output_type"] != "pil":
            raise ValueError(f"output_type is {a['output_type']!r}; pictures are pasted back only for 'pil'")

        boxes: list[Box | None] = [None] * len(pictures)
        if crop is None:
            pixels = pixels_of(config, pictures, a["height"], a["width"], resample)
            size = pixels.shape[1:3]
            holes = np.stack([binary_mask(mask, size[0], size[1], resample) for mask in masks])
        else:
            pixels, holes, boxes = self._cropped(pictures, masks, a, resample)
        shape = latent_shape_of(config, pixels)
        from_noise = check_number("strength", a["strength"], 0, 1) == 1
        name, unused = ("noise", "latents")[:: 1 if from_noise else -1]
        if a[name] is not None:
            raise ValueError(f"{name} is given, but at strength {a['strength']} the initial noise is {unused!r}")
        prompts = count_prompts(a, len(pixels))
        common = check_request(config, a, shape, prompts, None if from_noise else a["strength"])
        masked = masked_image(pixels, holes) if config.task == "inpaint" else None
        encodes_image = masked is None or not from_noise
        encoded = pixels if encodes_image or masked is None else masked
        encodings = int(encodes_image) + (masked is not None)
        return InpaintRequest(
            **common,
            start=check_start(a, encoded, common["batch"], shape, encodings),
            condition=check_own_condition(config, a, prompts),
            mask=np.stack([latent_mask(hole, config.vae.factor) for hole in holes]),
            masked=masked,
            from_noise=from_noise,
            kept=[(_uint8(p), m, box) for p, m, box in zip(pictures, masks, boxes, strict=True)] if keeps else None,
        )

    def _cropped(
        self, pictures: Sequence[np.ndarray], masks: Sequence[Mask], a: Mapping[str, Any], resample: Resample
    ) -> tuple[np.ndarray, np.ndarray, list[Box | None]]:
        """The parts around the masks, fitted into the output's size: pixels, masks, and where they were."""
        multiple = self.config.vae.factor * self.config.unet.size_multiple
        pixels, holes = [], []
        boxes: list[Box | None] = []
        for picture, mask in zip(pictures, masks, strict=True):
            floor = floor_size(picture, multiple)
            sides = [f if a[name] is None else a[name] for name, f in zip(("height", "width"), floor, strict=True)]
            h, w, _ = check_latent_shape(self.config, *sides)
            height, width = h * self.config.vae.factor, w * self.config.vae.factor
            box = crop_region(mask, height, width, a["padding_mask_crop"])
            pixels.append(cropped_pixels(_uint8(picture), box, height, width, resample))
            holes.append(cropped_mask(mask, box, height, width, resample))
            boxes.append(box)
        if len({array.shape for array in pixels}) > 1:
            raise ValueError("image: the pictures are of several sizes; give height and width")
        return np.stack(pixels), np.stack(holes), boxes

    def _encode(self, request: Request) -> dict[str, np.ndarray]:
        assert isinstance(request, InpaintRequest)
        encoded = super()._encode(request)
        if request.masked is not None:
            both = request.encodes_image
            encoded["masked"] = self.vae_encode(request.masked) if both else encoded["start"]
        return encoded

    def _channels(self, request: Request, encoded: Mapping[str, np.ndarray], chunk: Chunk) -> jax.Array | None:
        assert isinstance(request, InpaintRequest)
        if request.masked is None:
            return None
        masked = self._latents(request, encoded["masked"], chunk, int(request.encodes_image))
        return jnp.concatenate([self._mask(request, chunk), masked], axis=-1)

    def _start(self, request: Request, encoded: Mapping[str, np.ndarray], chunk: Chunk) -> Carry:
        assert isinstance(request, InpaintRequest)
        if request.from_noise:
            return self._from_noise(request, request.latents, chunk)
        return super()._start(request, encoded, chunk)

    def _known(self, request: Request, encoded: Mapping[str, np.ndarray], chunk: Chunk) -> Known | None:
        assert isinstance(request, InpaintRequest)
        assert request.start is not None
        if request.masked is not None:
            return None
        given = request.latents if request.from_noise else request.start.noise
        noise = self._noise(given, Branch.LATENTS, request.latent_shape, chunk)
        return Known(self._mask(request, chunk), self._latents(request, encoded["start"], chunk), noise)

    def _mask(self, request: InpaintRequest, chunk: Chunk) -> jax.Array:
        return chunk.split(chunk.of_prompts(request.mask))

    def _finished_sizes(self, request: Request) -> set[tuple[int, int]]:
        assert isinstance(request, InpaintRequest)
        if request.kept is None:
            return super()._finished_sizes(request)
        return {(picture.shape[0], picture.shape[1]) for picture, _, _ in request.kept}

    def _finish(self, request: Request, images: list[Image.Image]) -> tuple[list[Image.Image], list[bool] | None]:
        assert isinstance(request, InpaintRequest)
        return super()._finish(request, images if request.kept is None else self._pasted(request, images))

    def _pasted(self, request: InpaintRequest, painted_images: list[Image.Image]) -> list[Image.Image]:
        assert request.kept is not None
        images = []
        for index, painted in enumerate(painted_images):
            picture, mask, box = request.kept[min(index // request.repeats, len(request.kept) - 1)]
            if box is None:
                painted = painted.resize(picture.shape[1::-1], Image.Resampling.LANCZOS)
            images.append(Image.fromarray(paste_back(np.asarray(painted), picture, mask, box)))
        return images


def _uint8(picture: np.ndarray) -> np.ndarray:
    return picture if picture.dtype == np.uint8 else np.rint(picture * 255).astype(np.uint8)
