"""Start images against diffusers' image processor, latents against its posterior."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unclip_jax.conditioning.latents import latents_from_moments
from unclip_jax.conditioning.vae_image import resize_nearest, start_pixels

pytestmark = pytest.mark.parity

side = st.integers(8, 300)
cells = st.none() | st.tuples(st.integers(1, 30), st.integers(1, 30))


def last(tensor):
    return np.moveaxis(tensor.numpy(), 1, -1)


@given(height=side, width=side, to=cells, seed=st.integers(0, 9))
@settings(max_examples=40)
@pytest.mark.parametrize(("factor", "resample"), [(8, "lanczos"), (4, "bicubic")])
def test_images_are_bit_equal(factor, resample, height, width, to, seed):
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    size = (None, None) if to is None else (factor * to[0], factor * to[1])
    want = VaeImageProcessor(vae_scale_factor=factor, resample=resample).preprocess(Image.fromarray(image), *size)
    np.testing.assert_array_equal(start_pixels(image, *size, multiple=factor, resample=resample), last(want)[0])


@given(height=side, width=side, to=cells)
@settings(max_examples=40)
def test_arrays_are_bit_equal(height, width, to):
    image = np.random.default_rng(0).random((height, width, 3), np.float32)
    size = (None, None) if to is None else (8 * to[0], 8 * to[1])
    want = VaeImageProcessor().preprocess(image[None], *size)
    np.testing.assert_array_equal(start_pixels(image, *size, multiple=8), last(want)[0])


@given(old=st.integers(1, 600), new=st.integers(1, 600))
@settings(max_examples=300)
def test_nearest_is_torchs(old, new):
    places = np.arange(old, dtype=np.float32)[:, None]
    want = F.interpolate(torch.from_numpy(places.T[None, :, :, None].copy()), size=(new, 1))[0, 0, :, 0]
    np.testing.assert_array_equal(resize_nearest(places, new, 1)[:, 0], want)


def test_posterior():
    rng = np.random.default_rng(0)
    moments = 20 * rng.standard_normal((2, 8, 6, 8), np.float32)
    wanted = DiagonalGaussianDistribution(torch.from_numpy(np.moveaxis(moments, -1, 1).copy()))
    noise = rng.standard_normal((2, 8, 6, 4), np.float32)
    drawn = 0.18215 * (wanted.mean + wanted.std * torch.from_numpy(np.moveaxis(noise, -1, 1).copy()))
    np.testing.assert_allclose(latents_from_moments(moments, noise, 0.18215), last(drawn), rtol=1e-5)  # 4e-7
    np.testing.assert_allclose(latents_from_moments(moments, None, 0.18215), last(0.18215 * wanted.mode()), rtol=1e-6)
