"""The metrics against their definitions: however the features come, in whatever parts."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from unclip_jax.evaluation.cmmd import cmmd, kernel_sum
from unclip_jax.evaluation.descriptors import color_and_shape
from unclip_jax.evaluation.frechet import frechet_distance, merge, moments, no_moments
from unclip_jax.evaluation.similarity import cosines, diversity, retrieval


def features(seed, count, width, shift=0.0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, width)) @ rng.standard_normal((width, width)) + shift).astype(np.float32)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 5), st.integers(0, 9))
def test_moments_merge_in_any_order(sizes, width, seed):
    x = features(seed, sum(sizes), width, 5.0)
    parts = np.split(x, np.cumsum(sizes)[:-1])
    forwards = backwards = no_moments(width)
    for part in parts:
        forwards = merge(forwards, moments(part))
    for part in reversed(parts):
        backwards = merge(moments(part), backwards)
    for merged in (forwards, backwards):
        assert merged.size == len(x)
        np.testing.assert_allclose(merged.mean, x.mean(0, dtype=np.float64), rtol=1e-9)
        if len(x) > 1:
            want = np.cov(x.astype(np.float64), rowvar=False).reshape(width, width)
            np.testing.assert_allclose(merged.covariance, want, rtol=1e-7, atol=1e-9)


def test_the_distance_of_normal_distributions_that_are_known():
    """Of diagonal covariances it is the distance of means and of standard deviations."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal((400, 6))
    base = (base - base.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(base, rowvar=False)).T)  # exactly white
    one, two = base * np.arange(1, 7) + 3, base * np.arange(7, 1, -1) - 1
    want = 6 * 4**2 + np.square(np.arange(1, 7) - np.arange(7, 1, -1)).sum()
    np.testing.assert_allclose(frechet_distance(moments(one), moments(two)), want, rtol=1e-9)


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(1, 8), st.integers(0, 9))
def test_the_distance_to_itself_is_zero_and_it_is_symmetric(count, width, seed):
    """Also with fewer features than dimensions."""
    one, two = moments(features(seed, count, width)), moments(features(seed + 1, count + 3, width, 1.0))
    scale = np.trace(one.covariance) + np.trace(two.covariance) + 1
    assert abs(frechet_distance(one, one)) < 1e-6 * scale
    np.testing.assert_allclose(frechet_distance(one, two), frechet_distance(two, one), atol=1e-6 * scale)
    assert frechet_distance(one, two) > 0


def test_one_feature_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(moments(np.ones((1, 3))), moments(np.ones((4, 3))))


def test_cmmd_is_its_definition_whatever_the_blocks():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((37, 12)), rng.standard_normal((23, 12)) + 0.5
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))

    def mean(p, q, sigma=10.0):
        return np.exp(-np.square(p[:, None] - q[None]).sum(-1) / (2 * sigma**2)).mean()

    want = 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))
    for block in (5, 16, 4096):
        np.testing.assert_allclose(cmmd(x, y, block=block), want, rtol=2e-3)
    np.testing.assert_allclose(cmmd(x, x), 0, atol=1e-3)
    parts = kernel_sum(a[:20], b) + kernel_sum(a[20:], b)
    np.testing.assert_allclose(parts, kernel_sum(a, b), rtol=1e-6)
    with pytest.raises(ValueError, match="want"):
        cmmd(np.zeros((0, 3)), y)


def test_similarities():
    x = np.array([[1.0, 0], [0, 2], [3, 3]])
    np.testing.assert_allclose(cosines(x, x[::-1]), [0.5**0.5, 1, 0.5**0.5])
    np.testing.assert_allclose(diversity(x), 1 - (0 + 2 * 0.5**0.5) / 3)
    with pytest.raises(ValueError, match="at least 2"):
        diversity(x[:1])


def test_retrieval_counts_ties_against_itself():
    gallery = np.eye(4)
    np.testing.assert_array_equal(retrieval(gallery[[2, 0]], gallery, [2, 0]), [0, 0])
    np.testing.assert_array_equal(retrieval(gallery[[2]], gallery, [1]), [3])
    np.testing.assert_array_equal(retrieval(np.ones((2, 4)), np.ones((5, 4)), [0, 3]), [4, 4])


def drawing(kind, color, shift=(0, 0), size=64):
    y, x = np.mgrid[:size, :size]
    y, x = y - size / 2 - shift[0], x - size / 2 - shift[1]
    inside = {"disc": np.hypot(x, y) < 18, "bar": (abs(x) < 6) & (abs(y) < 26), "bed": (abs(y) < 6) & (abs(x) < 26)}[
        kind
    ]
    return np.where(inside[..., None], np.uint8(color), np.uint8(255))


def test_descriptors_tell_colour_and_shape():
    red, blue = (200, 30, 30), (30, 30, 200)
    made = [drawing(kind, color) for kind in ("disc", "bar", "bed") for color in (red, blue)]
    described = color_and_shape(np.stack(made))
    np.testing.assert_allclose(np.linalg.norm(described, axis=1), 1)
    moved = color_and_shape(np.stack([drawing(k, c, (2, -3)) for k in ("disc", "bar", "bed") for c in (red, blue)]))
    np.testing.assert_array_equal(retrieval(moved, described, np.arange(6)), 0)
    larger = color_and_shape(np.stack([np.repeat(np.repeat(p, 2, 0), 2, 1) for p in made]))
    np.testing.assert_allclose(larger, described, atol=1e-12)


def test_a_blank_image_is_like_none():
    described = color_and_shape(np.full((1, 64, 64, 3), 255, np.uint8))
    assert np.isfinite(described).all()
