"""Masks and crops without torch: what is white is repainted, what is black is kept bit for bit, the rest is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from tests.golden_weights import GOLDEN
from unclip_jax.conditioning.crop import Box, crop_region, cropped_mask, cropped_pixels, paste_back
from unclip_jax.conditioning.masks import (
    binary_mask,
    check_same_size,
    latent_mask,
    load_mask,
    mask_size,
    masked_image,
)

side = st.integers(4, 90)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def box_mask(height, width, box):
    mask = np.zeros((height, width), np.uint8)
    mask[box.top : box.bottom, box.left : box.right] = 255
    return mask


def test_masks_are_the_originals_recording():
    """Its mask from a gray one, its masked image, its mask among the channels that the UNet reads."""
    golden = np.load(GOLDEN / "conditioning.npz")
    mask = binary_mask(load_mask(golden["mask_in"]), *golden["mask_in"].shape)
    np.testing.assert_array_equal(mask[..., 0], golden["mask"])
    np.testing.assert_array_equal(latent_mask(mask, 8)[..., 0], golden["latent_mask"])
    pixels, (top, left) = np.moveaxis(golden["image"], 0, -1), golden["place"]
    got = masked_image(pixels, mask[top : top + pixels.shape[0], left : left + pixels.shape[1]])
    np.testing.assert_array_equal(got, np.moveaxis(golden["masked_image"], 0, -1))


def test_every_form_of_a_mask(tmp_path):
    gray = noise(20, 30)[..., 0]
    want = (gray >= 128)[..., None].astype(np.float32)
    Image.fromarray(gray).save(tmp_path / "mask.png")
    sixteen = Image.fromarray(gray.astype(np.uint16) * 257)
    colour = np.repeat(gray[..., None], 3, 2)
    floats = gray.astype(np.float32) / 255
    forms = [gray, gray[..., None], colour, Image.fromarray(gray), tmp_path / "mask.png", str(tmp_path / "mask.png")]
    forms += [sixteen, floats, floats[..., None], floats.astype(np.float64), gray >= 128, Image.fromarray(floats)]
    forms += [Image.fromarray(np.dstack([colour, gray[::-1]]), "RGBA")]  # what its transparency says is ignored
    for form in forms:
        mask = load_mask(form)
        assert mask_size(mask) == (20, 30)
        np.testing.assert_array_equal(binary_mask(mask, 20, 30), want)


def test_an_image_of_a_camera_lies_as_its_mask_does(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for array in (noise(20, 30), noise(20, 30)[..., 0].astype(np.uint16) * 257):
        Image.fromarray(array).save(tmp_path / "mask.png", exif=exif)
        assert mask_size(load_mask(tmp_path / "mask.png")) == (30, 20)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (np.zeros((2, 3, 4), np.uint8), r"mask_image has shape \(2, 3, 4\); want \(H, W\)"),
        (np.zeros((0, 3), np.uint8), "mask_image has shape"),
        (np.zeros(3, np.uint8), "mask_image has shape"),
        (np.zeros((2, 3, 3), np.float32), "mask_image has shape"),
        (np.zeros((2, 0), bool), "mask_image has shape"),
        (np.full((2, 3), 2.0), "mask_image has values from 2 to 2"),
        (np.full((2, 3), np.nan), "mask_image has values that are NaN"),
        (np.zeros((2, 3), np.int64), "mask_image has dtype int64"),
        (None, "mask_image is a NoneType"),
        (7, "mask_image is a int"),
    ],
)
def test_what_is_no_mask(source, words):
    with pytest.raises(ValueError, match=words):
        load_mask(source)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"mask_image '.*none.png'"):
        load_mask(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(ValueError, match=r"mask_image '.*text.png': not an image"):
        load_mask(tmp_path / "text.png")


def test_empty_and_full_masks():
    for empty in (np.zeros((8, 8), np.uint8), np.full((8, 8), 127, np.uint8), np.zeros((8, 8), bool)):
        with pytest.raises(ValueError, match="mask_image has nothing white, so there is nothing to repaint"):
            binary_mask(load_mask(empty), 16, 16)
    with pytest.raises(ValueError, match="nothing to repaint"):
        crop_region(load_mask(np.zeros((8, 8), np.uint8)), 16, 16, 4)
    for full in (np.full((8, 8), 255, np.uint8), np.ones((8, 8), bool)):
        assert (binary_mask(load_mask(full), 16, 24) == 1).all()
        assert crop_region(load_mask(full), 16, 16, 4) == (0, 0, 8, 8)


def test_a_mask_of_another_size_is_refused():
    image, mask = noise(20, 30), load_mask(np.full((10, 30), 255, np.uint8))
    with pytest.raises(ValueError, match="mask_image is 30x10 pixels, image is 30x20; want the same size"):
        check_same_size(mask, image)
    with pytest.raises(ValueError, match="mask_image is 30x10 pixels, image is 30x20; want the same size"):
        paste_back(image, image, mask)
    with pytest.raises(ValueError, match="the painted image is 20x30 pixels"):
        paste_back(noise(30, 20), image, load_mask(np.ones((20, 30), bool)))
    for padding in (-1, 2.5, True, "4"):
        with pytest.raises(ValueError, match="padding_mask_crop is"):
            crop_region(mask, 64, 64, padding)


@given(height=side, width=side, data=st.data())
def test_a_crop_holds_the_mask_and_pasting_keeps_the_rest(height, width, data):
    (top, bottom), (left, right) = (
        sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True))) for n in (height, width)
    )
    marked = Box(left, top, right, bottom)
    padding = data.draw(st.integers(0, 30))
    image, mask = noise(height, width), load_mask(box_mask(height, width, marked))
    box = crop_region(mask, 32, 48, padding)
    assert 0 <= box.left <= max(left - padding, 0)
    assert 0 <= box.top <= max(top - padding, 0)
    assert width >= box.right >= min(right + padding, width)
    assert height >= box.bottom >= min(bottom + padding, height)
    assert cropped_pixels(image, box, 32, 48).shape == (32, 48, 3)
    assert cropped_mask(mask, box, 32, 48).shape == (32, 48, 1)
    out = paste_back(np.zeros((32, 48, 3), np.uint8), image, mask, box)
    kept = np.asarray(mask) == 0
    np.testing.assert_array_equal(out[kept], image[kept])
    assert not out[~kept].any()


def test_a_blurred_mask_mixes():
    image, painted = np.full((40, 40, 3), 200, np.uint8), np.full((40, 40, 3), 100, np.uint8)
    mask = Image.fromarray(box_mask(40, 40, Box(20, 0, 40, 40))).filter(ImageFilter.GaussianBlur(3))
    out = paste_back(painted, image, mask)
    want = 200 - 100 / 255 * np.asarray(mask, np.float32)
    np.testing.assert_allclose(out, np.repeat(want[..., None], 3, 2), atol=2)
    np.testing.assert_array_equal(out[np.asarray(mask) == 0], 200)
