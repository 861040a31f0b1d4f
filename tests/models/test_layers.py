"""What layers compute against closed forms in float64: the GELU and its derivatives, and the statistics of norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr

from unclip_jax.models.layers import GroupNorm, gelu


def test_gelu_and_its_derivatives_are_those_of_x_times_the_normal_distribution():
    x = np.linspace(-9, 9, 1001).astype(np.float32)
    exact = x.astype(np.float64)
    density = np.exp(-(exact**2) / 2) / np.sqrt(2 * np.pi)
    want = (exact * ndtr(exact), ndtr(exact) + exact * density, (2 - exact**2) * density)
    for function, values in zip((gelu, jax.grad(gelu), jax.grad(jax.grad(gelu))), want, strict=True):
        np.testing.assert_allclose(jax.vmap(function)(x), values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("offset", "corner"), [(0.0, 0.0), (300.0, 0.0), (0.0, 30.0)], ids=["plain", "offset", "corner"]
)
def test_statistics_of_a_group(dtype, offset, corner):
    """Also far from 0, where a sum of squares has no digits left, and with a pixel at the corner unlike all others."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 16, 16, 8)) * rng.uniform(0.5, 2, 8) + rng.standard_normal(8) + offset
    x[:, 0, 0] += corner
    given = jnp.asarray(x, dtype)
    exact = np.asarray(given, np.float64).reshape(2, 256, 4, 2)
    mean, variance = GroupNorm(8, 4, epsilon=1e-5).statistics(given)
    near = 1e-6 if dtype == "float32" else 1e-5  # measured: 3e-7 and 5e-6
    np.testing.assert_allclose(mean, np.repeat(exact.mean(axis=(1, 3)), 2, axis=1), rtol=near, atol=near)
    np.testing.assert_allclose(variance, np.repeat(exact.var(axis=(1, 3)), 2, axis=1), rtol=10 * near)
