"""From a picture file to what a batch has of it: cropped, mirrored, preprocessed for each network that looks at it."""

import dataclasses
from typing import Any, Literal

import numpy as np
from PIL import Image

from unclip_jax.conditioning.clip_image import Preprocess, preprocess
from unclip_jax.conditioning.tokenizer import Tokenizer
from unclip_jax.training.data import Record, load_rgb
from unclip_jax.training.masks import random_mask

DEPTH_SIDE = 384  # what the depth estimator sees of a square picture


@dataclasses.dataclass(frozen=True)
class RowLoader:
    """What a batch has of each record; see `unclip_jax.training.diffusion_objective.encode` for the names.

    resolution: of "picture". tokenizer: of "tokens", None for none. vision: the image encoder's size and
    preprocessing, of "pixel_values". whole_mask_share: of "mask", None for no masks. low_res_factor: by how much
    "low_res" is smaller. depth: whether there is a "depth_picture".
    """

    resolution: int
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    tokenizer: Tokenizer | None = None
    vision: tuple[int, Preprocess] | None = None
    whole_mask_share: float | None = None
    low_res_factor: int | None = None
    depth: bool = False

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, Any]:
        """Raises ValueError or OSError for a picture that cannot be read."""
        picture = square(load_rgb(record), self.resolution, self.crop, rng)
        if self.flip and rng.random() < 0.5:
            picture = picture[:, ::-1]
        row: dict[str, Any] = {"picture": to_unit(picture)}
        if self.tokenizer is not None:
            row["tokens"] = self.tokenizer([record.text])[0]
        if self.vision is not None:
            size, mode = self.vision
            row["pixel_values"] = preprocess(np.ascontiguousarray(picture), mode, size)
        if self.whole_mask_share is not None:
            row["mask"] = random_mask(rng, self.resolution, self.resolution, self.whole_mask_share)
        if self.low_res_factor is not None:
            row["low_res"] = to_unit(_resized(picture, self.resolution // self.low_res_factor))
        if self.depth:
            row["depth_picture"] = to_unit(_resized(picture, DEPTH_SIDE))
        return row


def square(picture: np.ndarray, side: int, crop: Literal["center", "random"], rng: np.random.Generator) -> np.ndarray:
    """A square of a picture: its shorter side resized (bicubic, with antialiasing), the longer one cut.

    picture: (H, W, 3) uint8 -> (side, side, 3) uint8.
    """
    height, width = picture.shape[:2]
    scale = side / min(height, width)
    height, width = max(round(height * scale), side), max(round(width * scale), side)
    resized = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
    shares = rng.random(2) if crop == "random" else (0.5, 0.5)
    top, left = (round(share * (length - side)) for share, length in zip(shares, (height, width), strict=True))
    return resized[top : top + side, left : left + side]


def to_unit(picture: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in -1..1."""
    return picture.astype(np.float32) / np.float32(127.5) - np.float32(1)


def _resized(picture: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(np.ascontiguousarray(picture)).resize((side, side), Image.Resampling.BICUBIC))
