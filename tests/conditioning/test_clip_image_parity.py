"""Preprocessing against transformers' image processor, and against the original's steps in torch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessorPil

from unclip_jax.conditioning.clip_image import CLIP_MEAN, CLIP_STD, load_image, preprocess

pytestmark = pytest.mark.parity

MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"]
side = st.integers(1, 600)


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def transformers_pixels(image, size):
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return np.moveaxis(processor(image, return_tensors="np")["pixel_values"][0], 0, -1)


@given(height=side, width=side, size=st.one_of(st.just(224), st.integers(1, 400)), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_diffusers_is_bit_equal_at_any_size(height, width, size, seed):
    assume(height * width > 1 and max(height, width) <= 100 * min(height, width))
    image = noise(height, width, seed=seed)
    np.testing.assert_array_equal(
        preprocess(image, "diffusers", size), transformers_pixels(Image.fromarray(image), size)
    )


@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (1, 100), (100, 1), (3, 299), (225, 224), (224, 224), (2000, 3000)])
def test_diffusers_is_bit_equal_at_the_edges(shape):
    image = noise(*shape)
    np.testing.assert_array_equal(preprocess(image, "diffusers"), transformers_pixels(Image.fromarray(image), 224))


@given(mode=st.sampled_from(MODES), height=st.integers(20, 90), width=st.integers(20, 90), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_colour_modes_are_bit_equal(mode, height, width, seed):
    """transformers composites transparency on white as well, but for palettes that hold RGBA.

    It takes no notice of EXIF and clips 16-bit gray.
    """
    if mode.startswith("P"):
        image = Image.fromarray(noise(height, width, seed=seed)).convert("P").convert(mode)
        image.info["transparency"] = seed
    else:
        image = Image.fromarray(noise(height, width, 4, seed)).convert(mode)
    ours = preprocess(load_image(image), "diffusers", 64)
    np.testing.assert_array_equal(ours, transformers_pixels(image, 64))


def test_transformers_still_has_the_settings_that_are_built_in():
    """A release that changes its defaults should be noticed."""
    processor = CLIPImageProcessorPil()
    assert processor.resample == Image.Resampling.BICUBIC
    assert dict(processor.crop_size) == {"height": 224, "width": 224}
    np.testing.assert_array_equal(np.float32(processor.image_mean), CLIP_MEAN)
    np.testing.assert_array_equal(np.float32(processor.image_std), CLIP_STD)


def blurred(x, sigmas, lengths):
    """Gaussian blur of (1, 3, H, W), first along W, reflecting without repeating the edge."""
    for axis in (3, 2):
        sigma, n = sigmas[axis - 2], lengths[axis - 2]
        at = torch.arange(n, dtype=torch.float32) - n // 2
        kernel = torch.exp(-(at**2) / (2 * sigma**2))
        kernel = (kernel / kernel.sum()).reshape((1, 1, 1, n) if axis == 3 else (1, 1, n, 1)).repeat(3, 1, 1, 1)
        padding = (n // 2, n // 2, 0, 0) if axis == 3 else (0, 0, n // 2, n // 2)
        x = F.conv2d(F.pad(x, padding, mode="reflect"), kernel, groups=3)
    return x


def original_pixels(image, dialect, size):
    """The original's steps with torch's own interpolation; kornia's blur rule as two lines a version."""
    height, width = (length - length % 64 for length in image.shape[:2])
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)
    x = torch.from_numpy(np.array(resized)).float().permute(2, 0, 1)[None] / 255 * 2 - 1
    factors = [height / size, width / size]
    if max(factors) > 1:
        if dialect == "original":
            sigmas = [max((factor - 1) / 2, 0.001) for factor in factors]
            lengths = [int(max(4 * sigma, 3)) for sigma in sigmas]
        else:
            sigmas = [max(factor, 1.0) for factor in factors]
            lengths = [int(4 * sigma) for sigma in sigmas]
        x = blurred(x, sigmas, [n + 1 - n % 2 for n in lengths])
    x = F.interpolate(x, (size, size), mode="bicubic", align_corners=True)
    x = (x + 1) / 2
    return ((x[0].permute(1, 2, 0) - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)).numpy()


@pytest.mark.parametrize("dialect", ["original", "original-kornia-0.6.0"])
@given(
    height=st.integers(64, 1100),
    width=st.integers(64, 1100),
    size=st.sampled_from([224, 224, 56, 30, 336]),
    seed=st.integers(0, 9),
)
@settings(max_examples=20, deadline=None)
def test_original_equals_blur_and_interpolation_in_torch(dialect, height, width, size, seed):
    image = noise(height, width, seed=seed)
    want = original_pixels(image, dialect, size)
    np.testing.assert_allclose(preprocess(image, dialect, size), want, atol=5e-6, rtol=0)


def test_a_wrong_constant_would_be_noticed():
    """Another cubic kernel, or the other version's blur, is hundreds of tolerances away."""
    image = noise(500, 300)
    want = original_pixels(image, "original", 224)
    assert np.abs(preprocess(image, "original-kornia-0.6.0") - want).max() > 0.1
    antialiased = np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC), np.float32) / 255
    assert np.abs((antialiased - CLIP_MEAN) / CLIP_STD - want).max() > 0.1
