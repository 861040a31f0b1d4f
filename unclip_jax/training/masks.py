"""Random masks for training an inpainting model, by LaMa's strategy (Suvorov et al. 2022, arXiv:2109.07161).

A mask is polygonal chains drawn with a thick pen, or a few boxes. Some masks cover everything, so that the model also
learns to paint an image from nothing (a quarter in the inpainting model's own training, its `p_drop`).
"""

import numpy as np
from PIL import Image, ImageDraw

WHOLE_SHARE = 0.25
MARGIN = 10  # pixels of 256 that boxes keep from the border


def random_mask(rng: np.random.Generator, height: int, width: int, whole_share: float = WHOLE_SHARE) -> np.ndarray:
    """A random mask. Sizes of strokes and boxes are LaMa's for 256 pixels, scaled.

    Args:
        rng: The random generator.
        height: Of the mask.
        width: Of the mask.
        whole_share: The share of masks that are 1 everywhere.

    Returns:
        (height, width, 1) float32: 1 where the model paints, 0 where the image is kept.

    Raises:
        ValueError: The share is outside [0, 1].
    """
    if not 0 <= whole_share <= 1:
        raise ValueError(f"whole_share is {whole_share}; want a share between 0 and 1")
    if rng.random() < whole_share:
        return np.ones((height, width, 1), np.float32)
    canvas = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(canvas)
    (_strokes if rng.random() < 0.5 else _boxes)(draw, rng, height, width)
    return (np.asarray(canvas, np.float32) > 0)[..., None].astype(np.float32)


def _strokes(draw: ImageDraw.ImageDraw, rng: np.random.Generator, height: int, width: int) -> None:
    """One to five chains of one to five lines with round ends, up to 200 pixels of 256 long and 100 wide."""
    unit = max(height, width) / 256
    for _ in range(rng.integers(1, 6)):
        x, y = float(rng.integers(0, width)), float(rng.integers(0, height))
        for step in range(rng.integers(1, 6)):
            angle = rng.uniform(0, 2 * np.pi)
            angle = 2 * np.pi - angle if step % 2 else angle
            length, thick = unit * (10 + rng.integers(0, 200)), max(1.0, unit * (5 + rng.integers(0, 100)))
            to_x = float(np.clip(x + length * np.sin(angle), 0, width))
            to_y = float(np.clip(y + length * np.cos(angle), 0, height))
            draw.line([(x, y), (to_x, to_y)], fill=255, width=round(thick))
            for end_x, end_y in ((x, y), (to_x, to_y)):
                draw.ellipse([end_x - thick / 2, end_y - thick / 2, end_x + thick / 2, end_y + thick / 2], fill=255)
            x, y = to_x, to_y


def _boxes(draw: ImageDraw.ImageDraw, rng: np.random.Generator, height: int, width: int) -> None:
    """One to three boxes with sides of 30 to 150 pixels of 256."""
    unit = min(height, width) / 256
    margin = round(unit * MARGIN)
    for _ in range(rng.integers(1, 4)):
        across, down = (min(round(unit * rng.integers(30, 150)), side - 2 * margin) for side in (width, height))
        left = int(rng.integers(margin, max(width - margin - across, margin) + 1))
        top = int(rng.integers(margin, max(height - margin - down, margin) + 1))
        draw.rectangle([left, top, left + max(across, 1) - 1, top + max(down, 1) - 1], fill=255)
