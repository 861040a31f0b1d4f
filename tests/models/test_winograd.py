"""Convolution in Winograd's domain against convolution itself, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.convolutions import definition, sides
from unclip_jax.models import winograd
from unclip_jax.models.convolution import convolve
from unclip_jax.models.winograd import convolve_transformed, matrices, tile_of, transform_kernel, transformed_shape


def relative(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("tile", [2, 4])
def test_the_transforms_are_a_correlation(tile):
    inputs, kernels, outputs = matrices(tile)
    rng = np.random.default_rng(0)
    x, k = rng.standard_normal(tile + 2), rng.standard_normal(3)
    np.testing.assert_allclose(outputs @ ((inputs @ x) * (kernels @ k)), np.correlate(x, k), atol=1e-14)


@given(
    st.integers(3, 19),
    st.integers(3, 19),
    st.integers(1, 5),
    st.integers(1, 5),
    st.tuples(sides, sides),
    st.sampled_from([2, 4]),
    st.sampled_from([100, 10**6]),
)
@settings(max_examples=25)
def test_every_size_and_padding_is_the_convolution(height, width, channels, out, padding, tile, strip):
    """In strips of rows as well as at once."""
    rng = np.random.default_rng(height * width)
    x = rng.standard_normal((2, height, width, channels), np.float32)
    kernel, bias = rng.standard_normal((3, 3, channels, out), np.float32), rng.standard_normal(out, np.float32)
    got = convolve_transformed(x, transform_kernel(kernel, tile), padding, strip) + bias
    want = definition(x, kernel, bias, 1, padding)
    assert got.shape == want.shape
    assert relative(got, want) < 2e-6  # 5e-7


@pytest.mark.parametrize(("tile", "bound"), [(2, 1e-6), (4, 2e-6)])  # 4.9e-7, 9.3e-7
def test_the_error_stays_small_over_many_channels(tile, bound):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, 16, 16, 256), np.float32)
    kernel = rng.standard_normal((3, 3, 256, 64), np.float32)
    padding = ((1, 1), (1, 1))
    got = convolve(x, transform_kernel(kernel, tile), padding=padding)
    assert relative(got, definition(x, kernel, 0, 1, padding)) < bound


@pytest.mark.parametrize("tile", [2, 4])
def test_a_kernel_is_rounded_once(tile, monkeypatch):
    kernel = np.random.default_rng(2).standard_normal((3, 3, 5, 7), np.float32)
    transform = matrices(tile)[1]
    exact = np.einsum("ai,bj,ijco->abco", transform, transform, kernel.astype(np.float64))
    monkeypatch.setattr(winograd, "BLOCK", 8)  # 35 weights: five blocks, the last one smaller
    got = transform_kernel(kernel, tile)
    assert got.shape == transformed_shape(kernel.shape, tile)
    np.testing.assert_allclose(got.reshape(exact.shape), exact, rtol=6e-8, atol=1e-15)  # half a unit in the last place


def test_the_products_are_a_quarter():
    """Counted by the compiler: what is left over 36 / 144 are the transforms of few channels."""
    x, kernel = jnp.ones((1, 32, 32, 256)), np.ones((3, 3, 256, 256), np.float32)

    def flops(kernel):
        return jax.jit(convolve).lower(x, kernel).compile().cost_analysis()["flops"]

    assert flops(jnp.asarray(transform_kernel(kernel, 4))) < 0.3 * flops(jnp.asarray(kernel))  # 0.28


@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((3, 3, 320, 320), 4),
        ((3, 3, 1280, 640), 4),
        ((3, 3, 640, 1280), 2),
        ((3, 3, 4, 320), None),
        ((3, 3, 320, 4), None),
        ((1, 1, 320, 320), None),
        ((320, 320), None),
        ((320,), None),
    ],
)
def test_the_kernels_that_are_worth_it(shape, tile):
    assert tile_of(shape) == tile
