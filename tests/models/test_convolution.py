"""Convolution against its definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from tests.models.convolutions import definition, sides
from unclip_jax.models.convolution import convolve


@given(
    st.integers(3, 9),
    st.integers(3, 9),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from([1, 3]),
    st.sampled_from([1, 2]),
    st.tuples(sides, sides),
)
@settings(max_examples=25)
def test_convolutions_are_the_definition(height, width, channels, out, size, stride, padding):
    rng = np.random.default_rng(height * width)
    x = rng.standard_normal((2, height, width, channels), np.float32)
    kernel, bias = rng.standard_normal((size, size, channels, out), np.float32), rng.standard_normal(out, np.float32)
    got = convolve(x, kernel, bias, stride=stride, padding=padding)
    np.testing.assert_allclose(got, definition(x, kernel, bias, stride, padding), atol=2e-5)
    np.testing.assert_allclose(
        convolve(x, kernel, stride=stride, padding=padding), definition(x, kernel, 0, stride, padding), atol=2e-5
    )


def test_gradients_are_the_definitions():
    rng = np.random.default_rng(0)
    arrays = (rng.standard_normal(s, np.float32) for s in ((1, 5, 6, 3), (3, 3, 3, 4), (4,)))
    check_grads(convolve, tuple(map(jnp.asarray, arrays)), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_half_precision_keeps_its_dtype():
    x, kernel = jnp.ones((1, 4, 4, 2), jnp.bfloat16), jnp.ones((3, 3, 2, 2), jnp.bfloat16)
    assert jax.eval_shape(convolve, x, kernel).dtype == jnp.bfloat16
