"""Depth: the estimator's input against OpenCV and transformers, the map against torch."""

import math
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionDepth2ImgPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import DPTImageProcessor

from convert.rules import depth as rules
from tests.models.comparisons import TINY_DEPTH, converted, depth_reference
from tests.references import disturbed
from unclip_jax.conditioning.depth import depth_condition, estimator_pixels, estimator_size, resize_cubic

pytestmark = pytest.mark.parity

side = st.integers(16, 400)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@given(old=st.tuples(side, side), new=st.tuples(side, side))
@settings(max_examples=30)
def test_opencvs_cubic(old, new):
    image = np.random.default_rng(0).random((*old, 3), np.float32)
    want = cv2.resize(image, new[::-1], interpolation=cv2.INTER_CUBIC)
    np.testing.assert_allclose(resize_cubic(image, *new), want, atol=5e-6, rtol=0)  # 5e-7


def midas_pixels(image):
    """MiDaS' transform for `dpt_hybrid`, written anew: its own sizes, OpenCV's resize."""
    height, width = image.shape[:2]
    down, across = 384 / height, 384 / width
    scale = across if abs(1 - across) < abs(1 - down) else down
    size = [int(np.round(scale * n / 32)) * 32 for n in (width, height)]
    x = (image.astype(np.float32) / np.float32(127.5) - 1) / 2 + np.float32(0.5)
    return (cv2.resize(x, size, interpolation=cv2.INTER_CUBIC) - 0.5) / 0.5


@given(height=st.integers(1, 14), width=st.integers(1, 14))
@settings(max_examples=20)
def test_the_originals_input(height, width):
    image = noise(64 * height, 64 * width)
    if max(height, width) > 10 * min(height, width):
        assert min(estimator_size(*image.shape[:2])) == 32
        return
    want = midas_pixels(image)
    got = estimator_pixels(image, "original")
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)


@given(height=st.integers(1, 900), width=st.integers(1, 900))
@settings(max_examples=20)
def test_transformers_input_is_bit_equal(height, width):
    image = noise(height, width)
    options = {"size": {"height": 384, "width": 384}, "keep_aspect_ratio": False, "ensure_multiple_of": 1}
    want = DPTImageProcessor(**options, image_mean=[0.5] * 3, image_std=[0.5] * 3)(Image.fromarray(image))
    got = estimator_pixels(image, "diffusers")
    np.testing.assert_array_equal(got, np.moveaxis(np.asarray(want["pixel_values"][0]), 0, -1))


@given(old=st.tuples(side, side), new=st.tuples(st.integers(1, 60), st.integers(1, 60)))
@settings(max_examples=12)
def test_the_map_is_diffusers(old, new):
    depth = 30 * np.random.default_rng(0).random((2, *old), np.float32)
    want = F.interpolate(torch.from_numpy(depth)[:, None], size=new, mode="bicubic", align_corners=False)
    least, most = (f(want, dim=[1, 2, 3], keepdim=True) for f in (torch.amin, torch.amax))
    want = (2.0 * (want - least) / (most - least) - 1.0).numpy()
    got = np.asarray(depth_condition(depth, *new))
    assert np.isfinite(got).all()
    if math.prod(new) > 4:
        np.testing.assert_allclose(np.moveaxis(got, -1, 1), want, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_from_an_image_to_the_map_as_diffusers_goes():
    """Its processor, transformers' network, its normalisation; images that are not square."""
    reference = disturbed(depth_reference(TINY_DEPTH), size=0.1).eval()
    with torch.no_grad():
        reference.head.head[-2].bias.fill_(100.0)  # the last ReLU would hide most of what random weights make
    options = {"size": {"height": 64, "width": 64}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    pipe = SimpleNamespace(
        feature_extractor=DPTImageProcessor(**options), depth_estimator=reference, vae_scale_factor=8
    )
    table = lambda t: rules.transformers(t, "depth_estimator/", TINY_DEPTH)  # noqa: E731
    ours = converted("depth_estimator", TINY_DEPTH, table, reference)
    prepare = StableDiffusionDepth2ImgPipeline.prepare_depth_map
    for number, (height, width) in enumerate(((128, 192), (320, 64))):
        image = np.asarray(Image.fromarray(noise(6, 5, number)).resize((width, height)))
        with torch.no_grad():
            want = prepare(pipe, Image.fromarray(image), None, 1, False, torch.float32, torch.device("cpu")).numpy()
        depth = ours(estimator_pixels(image, "diffusers", side=64)[None])
        got = np.asarray(depth_condition(depth, height // 8, width // 8))
        np.testing.assert_allclose(np.moveaxis(got, -1, 1), want, atol=1e-4, rtol=0)
