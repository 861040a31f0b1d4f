"""Colour and shape by plain arithmetic: a judge of variations that no network was trained against."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 64  # the size at which images are described, in pixels
CELLS = 8
ORIENTATIONS = 8


def color_and_shape(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Describes images by unit vectors: half the length is colour, half is shape.

    Colour is the mean lightness and two opponent colours of 8x8 cells. Shape is histograms of gradient directions in
    the same cells, weighted by their strength (Dalal & Triggs 2005, without their blocks). The mean over cells is
    subtracted from both, so that what is the same everywhere does not count.

    Args:
        images: (B, H, W, 3) uint8.

    Returns:
        (B, D) float64.
    """
    return np.stack([_describe(image) for image in images])


def _describe(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    small = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX), np.float64) / 255
    red, green, blue = np.moveaxis(small, -1, 0)
    light = (red + green + blue) / 3
    opponents = np.stack([light, red - green, (red + green) / 2 - blue], axis=-1)
    color = _cells(opponents).mean(axis=(1, 3))

    down, across = np.gradient(light)
    strength = np.hypot(down, across)
    # Directions of edges, not of slopes: a light thing on dark is the shape that a dark one on light is.
    direction = np.arctan2(down, across) % np.pi * (ORIENTATIONS / np.pi)
    bins = np.eye(ORIENTATIONS)[direction.astype(int) % ORIENTATIONS] * strength[..., None]
    shape = np.sqrt(_cells(bins).sum(axis=(1, 3)))
    return np.concatenate([_unit(color - color.mean((0, 1))), _unit(shape - shape.mean((0, 1)))]) / np.sqrt(2)


def _cells(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """(SIDE, SIDE, C) -> (CELLS, SIDE / CELLS, CELLS, SIDE / CELLS, C)."""
    step = SIDE // CELLS
    return x.reshape(CELLS, step, CELLS, step, -1)


def _unit(x: NDArray[np.float64]) -> NDArray[np.float64]:
    flat = x.ravel()
    return flat / max(float(np.linalg.norm(flat)), 1e-12)
