"""From an image file to an example: cropped, mirrored, and preprocessed for each network that reads it."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from PIL import Image

from unclip_jax.conditioning.clip_image import Preprocess, preprocess
from unclip_jax.conditioning.tokenizer import Tokenizer
from unclip_jax.training.data import Record, load_rgb, named_image
from unclip_jax.training.masks import random_mask

Cut = Callable[[np.ndarray], np.ndarray]
Hint = Callable[[Record, np.ndarray, Cut], np.ndarray]
DEPTH_SIDE = 384  # what the depth estimator sees of a square image


@dataclasses.dataclass(frozen=True)
class ExampleLoader:
    """Loads the example of a record; see `unclip_jax.training.diffusion_objective.encode` for the names.

    Args:
        resolution: Of "image".
        crop: How images that are not square are cut.
        flip: Mirror half of the images, at random.
        tokenizer: Makes "tokens"; None for none.
        vision: The image encoder's size and preprocessing, for "pixel_values"; None for none.
        whole_mask_share: Of "mask"; None for no masks.
        low_res_factor: How much smaller "low_res" is; None for none.
        depth: Whether there is a "depth_image".
        hint: (record, the example's image, what cuts another image as that was) -> "hint", (H, W, 3) float32 in 0..1;
            None for none.
        original: The column that names the file of "original", the image before an instruction changed it; None for
            none.
    """

    resolution: int
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    tokenizer: Tokenizer | None = None
    vision: tuple[int, Preprocess] | None = None
    whole_mask_share: float | None = None
    low_res_factor: int | None = None
    depth: bool = False
    hint: Hint | None = None
    original: str | None = None

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, Any]:
        """Loads the example of a record.

        Raises:
            ValueError: The image cannot be read. May also be an OSError.
        """
        state = rng.bit_generator.state

        def cut(picture: np.ndarray) -> np.ndarray:
            rng.bit_generator.state = state  # every picture of a record in the same way
            made = square(picture, self.resolution, self.crop, rng)
            return np.ascontiguousarray(made[:, ::-1]) if self.flip and rng.random() < 0.5 else made

        image = cut(load_rgb(record))
        row: dict[str, Any] = {"image": to_unit(image)}
        if self.tokenizer is not None:
            row["tokens"] = self.tokenizer([record.text])[0]
        if self.vision is not None:
            size, mode = self.vision
            row["pixel_values"] = preprocess(np.ascontiguousarray(image), mode, size)
        if self.whole_mask_share is not None:
            row["mask"] = random_mask(rng, self.resolution, self.resolution, self.whole_mask_share)
        if self.low_res_factor is not None:
            row["low_res"] = to_unit(_resized(image, self.resolution // self.low_res_factor))
        if self.depth:
            row["depth_image"] = to_unit(_resized(image, DEPTH_SIDE))
        if self.hint is not None:
            row["hint"] = self.hint(record, image, cut)
        if self.original is not None:
            row["original"] = to_unit(cut(named_image(record, self.original)))
        return row


def square(image: np.ndarray, side: int, crop: Literal["center", "random"], rng: np.random.Generator) -> np.ndarray:
    """A square of an image: the shorter side resized (bicubic, with antialiasing), the longer one cut.

    image: (H, W, 3) uint8 -> (side, side, 3) uint8.
    """
    height, width = image.shape[:2]
    scale = side / min(height, width)
    height, width = max(round(height * scale), side), max(round(width * scale), side)
    resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    shares = rng.random(2) if crop == "random" else (0.5, 0.5)
    top, left = (round(share * (length - side)) for share, length in zip(shares, (height, width), strict=True))
    return resized[top : top + side, left : left + side]


def to_unit(image: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in -1..1."""
    return image.astype(np.float32) / np.float32(127.5) - np.float32(1)


def _resized(image: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((side, side), Image.Resampling.BICUBIC))
