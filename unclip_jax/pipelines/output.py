"""What calls return."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from unclip_jax.image_files import to_uint8

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
    """

    step: int
    num_steps: int
    latents: np.ndarray
    x0: np.ndarray
    finish: Callable[[np.ndarray], list[Image.Image]]

    def preview(self) -> list[Image.Image]:
        """Small images, one pixel per latent cell: a linear guess from the current estimate of the end."""
        rgb = np.clip(self.x0[..., : len(LATENT_RGB)] @ LATENT_RGB[: self.x0.shape[-1]] + 0.5, 0.0, 1.0)
        return [Image.fromarray(a) for a in to_uint8(rgb, "round")]

    def decode(self) -> list[Image.Image]:
        """Full images of the current estimate of the end, finished as those of a call: checked and marked."""
        return self.finish(self.x0)
