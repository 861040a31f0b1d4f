"""What layers compute against closed forms in float64: the GELU and its derivatives, and the statistics of norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import ndtr

from unclip_jax.models.layers import GroupNorm, Linear, gelu


def test_gelu_and_its_derivatives_are_those_of_x_times_the_normal_distribution():
    x = np.linspace(-9, 9, 1001).astype(np.float32)
    exact = x.astype(np.float64)
    density = np.exp(-(exact**2) / 2) / np.sqrt(2 * np.pi)
    want = (exact * ndtr(exact), ndtr(exact) + exact * density, (2 - exact**2) * density)
    for function, values in zip((gelu, jax.grad(gelu), jax.grad(jax.grad(gelu))), want, strict=True):
        np.testing.assert_allclose(jax.vmap(function)(x), values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("offset", [0.0, 30.0, 300.0])
def test_statistics_of_a_group(dtype, offset):
    """Of the values as they are in this dtype. In bfloat16, within the variance of their rounding to it."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 16, 16, 8)) * rng.uniform(0.5, 2, 8) + rng.standard_normal(8) + offset
    given = jnp.asarray(x, dtype)
    exact = np.asarray(given, np.float64).reshape(2, 256, 4, 2)
    mean, variance = GroupNorm(8, 4, epsilon=1e-5).statistics(given)
    np.testing.assert_allclose(mean, np.repeat(exact.mean(axis=(1, 3)), 2, axis=1), rtol=1e-6, atol=1e-6)
    rounding = (float(jnp.finfo(dtype).eps) * offset) ** 2 / 12 if dtype == "bfloat16" else 0
    wanted = np.repeat(exact.var(axis=(1, 3)), 2, axis=1)
    np.testing.assert_allclose(variance, wanted, rtol=1e-5, atol=rounding)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_halves_of_a_product(dtype):
    layer = Linear(6, 8, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    layer.bias = nnx.Param(jnp.arange(8.0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 6)), jnp.float32)
    halves = layer.halves(x)
    assert {half.dtype for half in halves} == {jnp.dtype(dtype)}
    want = np.asarray(layer(x), np.float32)
    np.testing.assert_allclose(
        np.concatenate(halves, -1, dtype=np.float32, casting="unsafe"), want, rtol=1e-2 if dtype == "bfloat16" else 1e-6
    )
