"""Moves between embeddings: properties, and slerp against its textbook form in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unclip_jax.conditioning.interpolation import (
    edit_by_text,
    interpolate_grid,
    interpolate_path,
    noise_level_sweep,
    slerp,
)

WIDTH = 24
shares = st.floats(0, 1, width=32)
seeds = st.integers(0, 1000)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal((*shape, WIDTH)).astype(np.float32) * 3


def norm(x):
    return np.linalg.norm(np.asarray(x, np.float64), axis=-1)


def angle(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.arccos(np.clip((a * b).sum(-1) / norm(a) / norm(b), -1, 1))


def textbook(a, b, share):
    a, b, w = a.astype(np.float64), b.astype(np.float64), angle(a, b)[..., None]
    return (np.sin((1 - share) * w) * a + np.sin(share * w) * b) / np.sin(w)


@settings(max_examples=20)
@given(seeds, shares)
def test_slerp(seed, share):
    a, b = normal(seed, 5), normal(seed + 1, 5)
    got = slerp(jnp.asarray(a), jnp.asarray(b), share)
    np.testing.assert_allclose(got, textbook(a, b, share), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got, slerp(b, a, 1 - share), rtol=1e-4, atol=1e-4)
    b = b / norm(b)[:, None] * norm(a)[:, None]
    even = slerp(a, jnp.asarray(b, jnp.float32), share)
    np.testing.assert_allclose(norm(even), norm(a), rtol=1e-5)
    np.testing.assert_allclose(angle(a, even), share * angle(a, b), atol=2e-3)


def test_slerp_where_angles_are_extreme():
    a = normal(0)
    for b in (a, a * (1 + 1e-6), 2 * a, -a, np.zeros_like(a)):
        got = slerp(a, b, np.linspace(0, 1, 5, dtype=np.float32))
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got[0], a, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got[-1], b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(slerp(a, 2 * a, 0.25), 1.25 * a, rtol=1e-6)
    # Either side of where the straight line takes over, the two agree.
    side = normal(1)
    for distance in (1e-6, 1e-5, 1e-4, 1e-3):
        b = (a + distance * side).astype(np.float32)
        np.testing.assert_allclose(slerp(a, b, 0.3), 0.7 * a + 0.3 * b, rtol=1e-5, atol=1e-5)
    assert np.isfinite(jax.grad(lambda x: slerp(x, jnp.asarray(a), 0.5).sum())(jnp.asarray(a))).all()


def test_path_and_grid():
    three = normal(0, 3)
    path = interpolate_path(three, 7)
    np.testing.assert_allclose(path[::3], three, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(path[1], slerp(three[0], three[1], 1 / 3), rtol=1e-4, atol=1e-4)
    corners = normal(1, 2, 2)
    grid = np.asarray(interpolate_grid(corners, 4, 5))
    assert grid.shape == (4, 5, WIDTH)
    np.testing.assert_allclose(grid[::3, ::4], corners, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grid[:, 0], interpolate_path(corners[:, 0], 4), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grid[0], interpolate_path(corners[0], 5), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grid[1], interpolate_path(grid[1, ::4], 5), rtol=1e-4, atol=1e-4)


@settings(max_examples=20)
@given(seeds, shares)
def test_text_difference(seed, share):
    image, source, target = normal(seed, 4), normal(seed + 1, 4), normal(seed + 2)
    got = edit_by_text(image, source, target, share)
    np.testing.assert_allclose(norm(got), norm(image), rtol=1e-5)
    np.testing.assert_allclose(got, edit_by_text(image, 0.3 * source, 7 * target, share), rtol=1e-3, atol=1e-3)
    direction = target / norm(target) - source / norm(source)[:, None]
    np.testing.assert_allclose(angle(got, direction), (1 - share) * angle(image, direction), atol=2e-3)
    np.testing.assert_allclose(edit_by_text(image, source, 0.3 * source, share), image, rtol=1e-5, atol=1e-5)


def test_noise_level_sweep():
    assert noise_level_sweep(5) == [0, 250, 500, 749, 999]
    assert noise_level_sweep(2, 800, 100) == [800, 100]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: interpolate_path(normal(0, 1), 5), "want .* at least two embeddings"),
        (lambda: interpolate_path(normal(0), 5), "want .* at least two embeddings"),
        (lambda: interpolate_path(normal(0, 2), 1), "count is 1"),
        (lambda: interpolate_grid(normal(0, 4), 3, 3), "corners has shape"),
        (lambda: edit_by_text(normal(0), normal(1), normal(2)[:8], 0.3), "want embeddings of one CLIP model"),
        (lambda: noise_level_sweep(3, 0, 1000), "levels in 0..999"),
        (lambda: noise_level_sweep(1), "count is 1"),
    ],
)
def test_what_cannot_be_interpolated_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
