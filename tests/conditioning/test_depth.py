"""Depth maps without torch: the original's recording, sizes, what a constant map becomes, what is no map."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.golden_weights import GOLDEN
from unclip_jax.conditioning.depth import depth_condition, estimator_pixels, estimator_size, load_depth_map

side = st.integers(1, 2000)


def test_the_depth_map_is_the_originals_recording():
    """The pixels of the map that the reduction reads; the others are left 0."""
    golden = np.load(GOLDEN / "conditioning.npz")
    read = np.arange(10, 14)
    depth = np.zeros((1, 384, 576), np.float32)
    rows, columns = ((24 * np.arange(n)[:, None] + read).ravel() for n in (16, 24))
    depth[0, rows[:, None], columns] = golden["depth_taps"]
    got = np.asarray(depth_condition(depth, 16, 24))
    np.testing.assert_allclose(got[0, ..., 0], golden["depth_map"], atol=2e-6, rtol=0)  # 4e-7


@given(height=side, width=side)
def test_the_estimators_sizes_are_the_originals(height, width):
    """Multiples of 32 in the image's proportions, near 384 on the side that changes less."""
    new = estimator_size(height, width)
    assert all(length % 32 == 0 and length >= 32 for length in new)
    assert 384 in new
    scale = 384 / height if new[0] == 384 and abs(1 - 384 / height) <= abs(1 - 384 / width) else 384 / width
    assert all(abs(a - b * scale) <= 16.001 or a == 32 for a, b in zip(new, (height, width), strict=True))


@pytest.mark.parametrize(
    ("size", "want"),
    [((512, 512), (384, 384)), ((768, 512), (576, 384)), ((512, 768), (384, 576)), ((384, 1536), (384, 1536))],
)
def test_sizes_that_are_known(size, want):
    assert estimator_size(*size) == want


def test_both_ways_to_the_estimator():
    image = np.random.default_rng(0).integers(0, 256, (512, 768, 3), np.uint8)
    flat = np.full((512, 768, 3), 200, np.uint8)
    for reference, shape in (("diffusers", (384, 384, 3)), ("original", (384, 576, 3))):
        pixels = estimator_pixels(image, reference)
        assert pixels.shape == shape
        assert pixels.dtype == np.float32
        np.testing.assert_allclose(estimator_pixels(flat, reference), 200 / 127.5 - 1, atol=1e-6)
        floats = estimator_pixels(image.astype(np.float32) / 255, reference)
        np.testing.assert_allclose(floats, pixels, atol=1e-6)
    with pytest.raises(ValueError, match="reference is 'midas'; accepted: original, diffusers"):
        estimator_pixels(image, "midas")


@pytest.mark.parametrize("value", [0.0, 3.3, -1e-20, 1234.567])
def test_a_constant_map_says_nothing(value):
    """Beside one that says something: each is stretched by itself."""
    depth = jnp.stack([jnp.full((30, 50), value), jnp.arange(1500.0).reshape(30, 50)])
    constant, other = depth_condition(depth, 8, 12)
    np.testing.assert_array_equal(constant, -1)
    assert (float(other.min()), float(other.max())) == (-1, 1)


@pytest.mark.parametrize(
    "source",
    [
        np.full((4, 5), 2.5),
        np.zeros((4, 5), np.uint8),
        np.full((4, 5), 2**30),
        np.full((4, 5), -1e30),
        np.ones((1, 1)),
        np.full((4, 5), 0.1, np.float32) + 1e-8 * np.arange(5, dtype=np.float32),  # but for rounding
        Image.new("L", (5, 4), 200),
        Image.new("I;16", (5, 4), 40000),
        Image.new("F", (5, 4), 0.3),
        Image.new("RGB", (5, 4), (7, 7, 7)),
    ],
)
def test_a_given_map_may_be_constant(source):
    depth = load_depth_map(source)
    np.testing.assert_array_equal(depth_condition(jnp.asarray(depth)[None], 8, 12), np.full((1, 8, 12, 1), -1))


def test_what_is_a_map(tmp_path):
    depth = np.random.default_rng(0).integers(0, 256, (6, 9), np.uint8)
    Image.fromarray(depth.astype(np.uint16) * 257).save(tmp_path / "depth.png")
    gray = Image.fromarray(depth)
    forms = [depth, depth[..., None], depth.astype(np.int32), depth.astype(np.float64), gray, gray.convert("RGB")]
    for form in [*forms, gray.convert("I"), gray.convert("F")]:
        loaded = load_depth_map(form)
        assert loaded.dtype == np.float32
        np.testing.assert_array_equal(loaded, depth)
    np.testing.assert_array_equal(load_depth_map(tmp_path / "depth.png"), depth.astype(np.float32) * 257)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (np.arange(24.0).reshape(2, 3, 4), r"depth_map has shape \(2, 3, 4\); want \(H, W\)"),
        (np.arange(4.0), "depth_map has shape"),
        (np.zeros((0, 4)), "depth_map has shape"),
        (np.array([[0, np.nan]]), "depth_map has values that are NaN"),
        (np.array([[0, 1e300]]), "depth_map has values that are NaN or infinite"),
        (np.array([[0, 1e35]]), "depth_map has values beyond 1e\\+30"),
        (np.array([[True, False]]), "depth_map has dtype bool"),
        (np.array([["a", "b"]]), "depth_map has dtype"),
        ("none.png", "depth_map 'none.png': no such file"),
        (None, "depth_map is a NoneType"),
        (Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)), "depth_map is a colour"),
    ],
)
def test_what_is_no_map(source, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        load_depth_map(source)
