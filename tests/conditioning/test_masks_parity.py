"""Masks, crops and pasting against diffusers' image processor."""

import numpy as np
import pytest
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from unclip_jax.conditioning.crop import crop_region, cropped_mask, cropped_pixels, paste_back
from unclip_jax.conditioning.masks import binary_mask, latent_mask, load_mask

pytestmark = pytest.mark.parity

IMAGES = VaeImageProcessor()
MASKS = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
side = st.integers(8, 120)
cells = st.integers(1, 12)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def last(tensor):
    return np.moveaxis(tensor.numpy(), 1, -1)[0]


def box_mask(height, width, seed, blur=0):
    """A white box somewhere, its edges soft with `blur`."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    (top, bottom), (left, right) = (sorted(rng.choice(n + 1, 2, replace=False)) for n in (height, width))
    mask[top:bottom, left:right] = 255
    return Image.fromarray(mask).filter(ImageFilter.GaussianBlur(blur))


@given(mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA"]), height=side, width=side, down=cells, across=cells)
@settings(max_examples=60)
def test_masks_are_equal(mode, height, width, down, across):
    mask = Image.fromarray(noise(height, width)).convert("RGB" if mode == "P" else "L").convert(mode)
    want = MASKS.preprocess(mask, 8 * down, 8 * across)
    assume(want.any())
    ours = binary_mask(load_mask(mask), 8 * down, 8 * across)
    np.testing.assert_array_equal(ours, last(want))
    np.testing.assert_array_equal(latent_mask(ours, 8), last(F.interpolate(want, size=(down, across))))


@given(height=side, width=side, down=cells, across=cells)
@settings(max_examples=30)
def test_arrays_are_equal(height, width, down, across):
    mask = np.random.default_rng(0).random((height, width), np.float32)
    want = MASKS.preprocess(mask[None], 8 * down, 8 * across)
    assume(want.any())
    np.testing.assert_array_equal(binary_mask(load_mask(mask), 8 * down, 8 * across), last(want))


@given(
    height=side,
    width=side,
    down=cells,
    across=cells,
    padding=st.integers(0, 80),
    blur=st.sampled_from([0, 3]),
    seed=st.integers(0, 99),
)
@settings(max_examples=100)
def test_crops_and_pastes_are_equal(height, width, down, across, padding, blur, seed):
    image, mask = noise(height, width), box_mask(height, width, seed, blur)
    assume(np.asarray(mask).max() >= 128)
    size = (8 * down, 8 * across)
    want = MASKS.get_crop_region(mask, size[1], size[0], padding)
    box = crop_region(mask, *size, padding)
    assert box == want
    fill = {"resize_mode": "fill", "crops_coords": want}
    try:
        wanted_mask = MASKS.preprocess(mask, *size, **fill)
    except ValueError:  # a part so thin that its shorter side comes to no pixel there; here it is one
        assert cropped_pixels(image, box, *size).shape == (*size, 3)
        return
    wanted_pixels = IMAGES.preprocess(Image.fromarray(image), *size, **fill)
    assume(wanted_mask.any())
    np.testing.assert_array_equal(cropped_mask(mask, box, *size), last(wanted_mask))
    np.testing.assert_array_equal(cropped_pixels(image, box, *size), last(wanted_pixels))
    painted = noise(*size, seed=1)
    want = IMAGES.apply_overlay(mask, Image.fromarray(image), Image.fromarray(painted), box)
    np.testing.assert_array_equal(paste_back(painted, image, mask, box), np.asarray(want))
    painted = noise(height, width, seed=1)
    want = IMAGES.apply_overlay(mask, Image.fromarray(image), Image.fromarray(painted))
    np.testing.assert_array_equal(paste_back(painted, image, mask), np.asarray(want))
