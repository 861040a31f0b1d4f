"""Images for the tests of the watermark; the integers of the first two are the same on every machine."""

import hashlib

import numpy as np


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def gradients(height, width):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + 2 * y) % 97 + 80], axis=-1).astype(np.uint8)


def natural(height, width, seed, chroma=6.0):
    """Brightness and, less so, colours with the spectrum of photographs, 1/f."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    planes = [
        np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) / frequency, (height, width)) for _ in "yuv"
    ]
    y, u, v = (plane / plane.std() for plane in planes)
    rgb = 128 + 45 * y[..., None] + chroma * np.stack([v, -0.3 * u - 0.5 * v, u], axis=-1)
    return np.clip(rgb, 0, 255).astype(np.uint8)


def digests(embed):
    """What `embed` makes of images that are the same everywhere, as hexadecimal SHA-256 of the pixels."""
    pictures = {"noise": noise(259, 302), "gradients": gradients(320, 256)}
    return {name: hashlib.sha256(embed(image).tobytes()).hexdigest() for name, image in pictures.items()}
