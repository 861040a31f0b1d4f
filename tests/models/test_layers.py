"""The exact GELU and its derivatives, which are written by hand, against their closed forms in float64."""

import jax
import numpy as np
from scipy.special import ndtr

from unclip_jax.models.layers import gelu


def test_gelu_and_its_derivatives_are_those_of_x_times_the_normal_distribution():
    x = np.linspace(-9, 9, 1001).astype(np.float32)
    exact = x.astype(np.float64)
    density = np.exp(-(exact**2) / 2) / np.sqrt(2 * np.pi)
    want = (exact * ndtr(exact), ndtr(exact) + exact * density, (2 - exact**2) * density)
    for function, values in zip((gelu, jax.grad(gelu), jax.grad(jax.grad(gelu))), want, strict=True):
        np.testing.assert_allclose(jax.vmap(function)(x), values, rtol=0, atol=1e-6)
