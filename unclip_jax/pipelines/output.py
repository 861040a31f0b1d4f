"""What calls return."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from unclip_jax.image_files import to_uint8

PreviewDecoder = Literal["linear", "tiny"]

# A linear guess of a latent cell's colour, for previews: rows are Stable Diffusion's four latent channels.
LATENT_RGB = np.array(
    [[0.298, 0.207, 0.208], [0.187, 0.286, 0.173], [-0.158, 0.189, 0.264], [-0.184, -0.271, -0.473]], np.float32
)


@dataclasses.dataclass(frozen=True)
class PipelineOutput:
    """What a call makes.

    Attributes:
        images: a list of PIL images, or (B, H, W, 3) float32 in 0..1, or latents, as `output_type` asked.
        latents: (B, H/f, W/f, 4) float32, scaled.
        image_embeds: (images, D) float32 of unCLIP checkpoints, before noising; None for the others.
        nsfw_content_detected: which images a safety checker has made black; None without one.
        rows: (B,) int, which of the call's images these are: all, or over several hosts those of this process.
        prediction: of estimators: depth (images, H, W, 1) or normals (images, H, W, 3), float32.
        uncertainty: (images, H, W, 1) float32, where an estimator is asked for it.
    """

    images: Any
    latents: np.ndarray
    image_embeds: np.ndarray | None
    nsfw_content_detected: list[bool] | None
    rows: np.ndarray
    prediction: np.ndarray | None = None
    uncertainty: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class StreamState:
    """One step of `Pipeline.stream`.

    Attributes:
        step: 1 to num_steps, which network evaluation it was.
        latents: (B, H/f, W/f, 4) float32 after it.
        x0: the same shape, the network's current estimate of the end.
        finish: latents -> finished images.
        tiny: latents -> images (B, H, W, 3) in 0..1, by the pipeline's tiny autoencoder; None without one.
    """

    step: int
    num_steps: int
    latents: np.ndarray
    x0: np.ndarray
    finish: Callable[[np.ndarray], list[Image.Image]]
    tiny: Callable[[np.ndarray], np.ndarray] | None = None

    def preview(self, decoder: PreviewDecoder = "linear") -> list[Image.Image]:
        """Images of the current estimate of the end, faster than `decode` makes them, and not marked or checked.

        Args:
            decoder: "linear", a guess from each latent cell, one pixel for it; or "tiny", full images by the tiny
                autoencoder that the pipeline was given as its `tiny_vae`.

        Raises:
            ValueError: For another decoder, or for "tiny" without a tiny autoencoder.
        """
        if decoder not in get_args(PreviewDecoder):
            raise ValueError(f"decoder is {decoder!r}; accepted: {', '.join(map(repr, get_args(PreviewDecoder)))}")
        if decoder == "tiny":
            if self.tiny is None:
                raise ValueError("decoder is 'tiny', but the pipeline has no tiny_vae; give it an unclip_jax.TinyVAE")
            return [Image.fromarray(a) for a in to_uint8(self.tiny(self.x0), "round")]
        rgb = np.clip(self.x0[..., : len(LATENT_RGB)] @ LATENT_RGB[: self.x0.shape[-1]] + 0.5, 0.0, 1.0)
        return [Image.fromarray(a) for a in to_uint8(rgb, "round")]

    def decode(self) -> list[Image.Image]:
        """Full images of the current estimate of the end, finished as those of a call: checked and marked."""
        return self.finish(self.x0)
