"""Start images in the VAE's range: sizes, padding, exact floats, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from unclip_jax.conditioning.latents import latents_from_moments
from unclip_jax.conditioning.vae_image import (
    floor_size,
    load_init_image,
    pad_to_multiple,
    resize_nearest,
    start_pixels,
    to_pixels,
)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@given(height=st.integers(1, 200), width=st.integers(1, 200), multiple=st.sampled_from([4, 8, 64]))
def test_sizes_are_rounded_down(height, width, multiple):
    image = noise(height, width)
    if min(height, width) < multiple:
        with pytest.raises(ValueError, match=f"image is {width}x{height} pixels; want sides of at least {multiple}"):
            start_pixels(image, multiple=multiple)
        return
    pixels = start_pixels(image, multiple=multiple)
    assert pixels.shape == (*floor_size(image, multiple), 3)
    assert pixels.shape == (height // multiple * multiple, width // multiple * multiple, 3)
    assert pixels.dtype == np.float32
    assert -1 <= pixels.min() <= pixels.max() <= 1


def test_images_that_fit_keep_their_levels():
    image = noise(64, 128)
    for resample in ("lanczos", "bicubic"):
        pixels = start_pixels(image, multiple=64, resample=resample)
        np.testing.assert_array_equal(np.rint((pixels + 1) * 127.5), image)
        # The original's demos write x / 127.5 - 1.
        np.testing.assert_allclose(pixels, image.astype(np.float32) / np.float32(127.5) - 1, atol=1.2e-7, rtol=0)
    np.testing.assert_array_equal(to_pixels(np.array([0, 255], np.uint8)), np.array([-1, 1], np.float32))


def test_floats_keep_their_values():
    exact = np.random.default_rng(0).random((16, 24, 3), np.float32)
    loaded = load_init_image(exact)
    np.testing.assert_array_equal(loaded, exact)
    np.testing.assert_array_equal(start_pixels(loaded, multiple=8), 2 * exact - 1)
    doubled = start_pixels(loaded, 32, 48, multiple=8)
    np.testing.assert_array_equal(doubled[::2, 1::2], 2 * exact - 1)
    # Gray and 8-bit images take the usual way.
    assert load_init_image(exact[..., 0]).dtype == np.uint8
    assert load_init_image(Image.fromarray(noise(4, 4))).shape == (4, 4, 3)
    with pytest.raises(ValueError, match="image has values from"):
        load_init_image(3 * exact)


@given(height=st.integers(1, 300), width=st.integers(1, 300))
def test_padding_repeats_the_edge(height, width):
    image = noise(height, width)
    padded = pad_to_multiple(image)
    assert all(side % 64 == 0 and side >= 128 for side in padded.shape[:2])
    assert all(new - old < 64 or new == 128 for new, old in zip(padded.shape[:2], image.shape[:2], strict=True))
    np.testing.assert_array_equal(padded[:height, :width], image)
    np.testing.assert_array_equal(padded[height:, :width], np.broadcast_to(image[-1], padded[height:, :width].shape))
    np.testing.assert_array_equal(
        padded[:, width:], np.repeat(padded[:, width - 1 : width], padded.shape[1] - width, 1)
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"height": 65, "multiple": 64}, "height is 65; want a positive multiple of 64"),
        ({"width": 0, "multiple": 8}, "width is 0"),
        ({"multiple": 8, "resample": "linear"}, "resample is 'linear'; accepted: lanczos, bicubic"),
    ],
)
def test_sizes_that_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        start_pixels(noise(64, 64), **arguments)


def test_nearest_takes_the_upper_left():
    image = np.arange(16).reshape(4, 4)
    np.testing.assert_array_equal(resize_nearest(image, 2, 2), image[::2, ::2])
    np.testing.assert_array_equal(resize_nearest(image, 3, 4)[:, 0], [0, 4, 8])


def test_latents_are_drawn_or_the_mode():
    rng = np.random.default_rng(0)
    moments, noise = (jnp.asarray(rng.standard_normal((2, 4, 4, c)), jnp.float32) for c in (8, 4))
    mean, logvar = moments[..., :4], moments[..., 4:]
    np.testing.assert_allclose(latents_from_moments(moments, None, 0.5), 0.5 * mean)
    want = 0.5 * (mean + np.exp(0.5 * logvar) * noise)
    np.testing.assert_allclose(latents_from_moments(moments, noise, 0.5), want, rtol=1e-6, atol=1e-7)
    # A variance that overflowed is clipped before it is used.
    assert np.isfinite(latents_from_moments(moments.at[..., 4:].set(300), noise, 0.5)).all()
