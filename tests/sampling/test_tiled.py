"""Tiles make no seam, need no memory that grows with the image, and are none where one holds everything."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unclip_jax.sampling.loop import sample
from unclip_jax.sampling.solvers import make_solver
from unclip_jax.sampling.tiled import _weights, tile_starts, tiled

pytestmark = pytest.mark.usefixtures("fully_compiled")

ROW = {"timestep": jnp.float32(500), "index": jnp.int32(0)}
KERNEL = np.random.default_rng(1).standard_normal((5, 5, 7, 4), np.float32) / 13


def normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


def blur(x, row):
    """A convolution that looks two places far, and a pointwise function of the noise level."""
    out = jax.lax.conv_general_dilated(x, KERNEL, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.tanh(out + row["timestep"] / 1000)


@given(length=st.integers(1, 400), tile=st.integers(1, 64), data=st.data())
def test_every_place_counts_once(length, tile, data):
    overlap = data.draw(st.integers(0, tile // 2))
    starts = tile_starts(length, tile, overlap)
    size = min(tile, length)
    weights = np.asarray(_weights(starts, size))
    assert weights.shape == (len(starts), size)
    assert weights.min() >= 0
    total = np.zeros(length)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + size] += weight
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert all(0 < b - a <= max(tile - overlap, 1) for a, b in itertools.pairwise(starts))


@pytest.mark.parametrize(("height", "width"), [(25, 24), (60, 7), (40, 57)])
def test_no_seam_of_a_network_that_looks_near(height, width):
    """Tiles of 24 with an overlap of 8: a quarter of it is what the convolution looks."""
    x = normal(2, height, width, 7)
    got = jax.jit(tiled(blur, 24, 8))(x, ROW)
    np.testing.assert_allclose(got, blur(x, ROW), atol=2e-6)  # 2e-7


def test_one_tile_is_the_whole_image():
    x = normal(1, 24, 17, 7)
    for tile, overlap in ((24, 8), (100, 0)):
        np.testing.assert_array_equal(tiled(blur, tile, overlap)(x, ROW), blur(x, ROW))


def test_whole_trajectories():
    """Through a solver's loop, the small image among the channels, as an upscaler's is."""
    solver = make_solver("dpm++2m", {}, 4)
    noise, low_res = normal(1, 40, 56, 4), normal(1, 40, 56, 3)

    def end(denoise):
        run = jax.jit(lambda z: sample(lambda x, row: denoise(jnp.concatenate([x, low_res], -1), row), solver, z))
        return run(noise)

    np.testing.assert_allclose(end(tiled(blur, 24, 8)), end(blur), rtol=2e-5, atol=2e-5)  # 1e-6


def wide(x, row):
    """A network whose inner maps are 64 times as wide as its input."""
    kernel = jnp.tile(jnp.asarray(KERNEL[:, :, :, :1]), (1, 1, 1, 448))
    out = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.sort(jnp.sin(out), axis=-1)[..., :4] + row["timestep"]


def test_memory_does_not_grow_with_the_image():
    """By the compiled programs' own account: beyond the image itself, only one tile's."""

    def temporaries(denoise, side):
        x = jax.ShapeDtypeStruct((1, side, side, 7), jnp.float32)
        return jax.jit(denoise).lower(x, ROW).compile().memory_analysis().temp_size_in_bytes

    small, large = (temporaries(tiled(wide, 32, 8), side) for side in (64, 256))
    pictures = 4 * (256**2 - 64**2) * (7 + 4)
    assert large - small <= 2 * pictures
    assert large < 0.25 * temporaries(wide, 256)


@pytest.mark.parametrize(("tile", "overlap", "words"), [(0, 0, "tile is 0"), (8, 5, "want 0 to 4"), (8, -1, "is -1")])
def test_what_is_no_tile(tile, overlap, words):
    with pytest.raises(ValueError, match=words):
        tiled(blur, tile, overlap)
