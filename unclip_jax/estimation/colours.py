"""Maps as pictures: depth in colours, normals as colours."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# ColorBrewer's Spectral in 11 classes, by Cynthia Brewer (https://colorbrewer2.org, Apache License 2.0).
_SPECTRAL = "9e0142 d53e4f f46d43 fdae61 fee08b ffffbf e6f598 abdda4 66c2a5 3288bd 5e4fa2"
SPECTRAL = np.array([tuple(bytes.fromhex(colour)) for colour in _SPECTRAL.split()], np.float32) / 255


def depth_picture(depth: NDArray[np.float32]) -> Image.Image:
    """(H, W, 1) in 0..1 -> from red, which is 0 and near, through yellow to blue."""
    place = np.clip(depth[..., 0], 0, 1) * (len(SPECTRAL) - 1)
    left = place.astype(int)
    share = (place - left)[..., None]
    colours = (1 - share) * SPECTRAL[left] + share * SPECTRAL[np.minimum(left + 1, len(SPECTRAL) - 1)]
    return _picture(colours)


def nearness_picture(depth: NDArray[np.float32]) -> Image.Image:
    """(H, W, 1) in 0..1, near to far -> 16 bits of gray, white is near: as depth to image and ControlNets read it."""
    return Image.fromarray(np.rint((1 - np.clip(depth[..., 0], 0, 1)) * 65535).astype(np.uint16))


def normals_picture(normals: NDArray[np.float32]) -> Image.Image:
    """(H, W, 3) in -1..1 -> x, y and z as red, green and blue."""
    return _picture((normals + 1) * np.float32(0.5))


def _picture(colours: NDArray[np.float32]) -> Image.Image:
    return Image.fromarray((colours * 255).astype(np.uint8))
