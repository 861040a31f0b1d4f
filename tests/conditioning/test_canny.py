"""Canny's edges without OpenCV: closed forms, and what holds for every image."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from unclip_jax.conditioning import canny

level = st.integers(0, 800)


def step(contrast, height=12, width=16, at=8):
    """Black left of a column, and as bright as `contrast` from there on: the gradient there is 4 * contrast."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:, at:] = contrast
    return image


@st.composite
def images(draw):
    height, width, seed = draw(st.integers(1, 30)), draw(st.integers(1, 30)), draw(st.integers(0, 999))
    coarse = draw(st.sampled_from([1, 40, 128]))  # the coarser, the more gradients are equal
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)) // coarse * coarse


def test_a_step_is_a_line_one_pixel_wide():
    """The gradient is the same on both sides; the left one stays."""
    edges = canny(step(60))
    assert edges.shape == (12, 16, 3)
    assert edges.dtype == np.uint8
    want = np.zeros((12, 16, 3), np.uint8)
    want[:, 7] = 255
    np.testing.assert_array_equal(edges, want)
    np.testing.assert_array_equal(canny(step(60).swapaxes(0, 1)), want.swapaxes(0, 1))


@pytest.mark.parametrize("direction", [1, -1])
def test_a_diagonal_is_a_diagonal(direction):
    y, x = np.mgrid[:16, :16]
    image = np.select([x > y, x == y], [240, 120]).astype(np.uint8)[:, ::direction]
    np.testing.assert_array_equal(canny(image)[..., 0], 255 * np.eye(16, dtype=np.uint8)[:, ::direction])


def test_a_faint_edge_is_kept_where_it_leads_on_from_a_clear_one():
    """One step whose gradient falls from 242 at the top to 124, and another of 120 that does not touch it."""
    image = np.zeros((31, 30, 3), np.uint8)
    image[:, 8:] = (60 - np.arange(31, dtype=np.uint8))[:, None, None]
    image[:, 20:] += 30
    first, second = canny(image, 100, 200)[:, [8, 19], 0].T
    assert first.all()
    assert not second.any()
    assert canny(image, 100, 100)[:, [8, 19]].all()
    rows = np.flatnonzero(canny(image, 182, 200)[:, 8, 0])
    np.testing.assert_array_equal(rows, np.arange(16))  # in row 16 it is 182, and not above


def test_the_channel_with_the_longest_gradient_counts():
    image = step(60)
    image[..., 1:] = 255 - step(20)[..., 1:]
    assert canny(image, 100, 239)[:, 7].all()
    assert not canny(image, 100, 240).any()


@given(images(), level, level, st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_edges_follow_the_image_and_its_thresholds(image, one, other, more):
    image, (low, high) = image.astype(np.uint8), sorted((one, other))
    edges = canny(image, low, high)[..., 0] > 0
    np.testing.assert_array_equal(canny(image.swapaxes(0, 1), low, high)[..., 0] > 0, edges.T)
    np.testing.assert_array_equal(canny(255 - image, low, high)[..., 0] > 0, edges)
    np.testing.assert_array_equal(canny(image, low + 0.5, high + 0.9)[..., 0] > 0, edges)
    strong, weak = (canny(image, level, level)[..., 0] > 0 for level in (high, low))
    labels, count = ndimage.label(weak, np.ones((3, 3)))
    reached = [labels == label for label in range(1, count + 1) if strong[labels == label].any()]
    np.testing.assert_array_equal(edges, np.any(reached, axis=0) if reached else np.zeros_like(edges))
    assert not (canny(image, low, high + more)[..., 0] > 0)[~edges].any()


def test_every_kind_of_image_is_read(tmp_path):
    image = step(60)
    Image.fromarray(image).save(tmp_path / "step.png")
    stored = io.BytesIO()
    Image.fromarray(image).save(stored, "PNG")
    gray = image[..., 0]
    for source in (tmp_path / "step.png", stored.getvalue(), Image.fromarray(image), gray, gray / 255):
        np.testing.assert_array_equal(canny(source), canny(image))


@pytest.mark.parametrize(
    ("thresholds", "match"),
    [
        ((-1, 200), "low_threshold is -1; want a number of at least 0"),
        ((100, float("nan")), "high_threshold is nan"),
        ((float("inf"), float("inf")), "low_threshold is inf"),
        ((201, 200), "low_threshold is 201, above high_threshold, 200"),
    ],
)
def test_wrong_thresholds_are_refused(thresholds, match):
    with pytest.raises(ValueError, match=match):
        canny(step(60), *thresholds)
