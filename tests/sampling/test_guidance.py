"""Guidance against plain numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.sampling import double, guide, interleave

RNG = np.random.default_rng(0)
UNCONDITIONAL, CONDITIONAL = RNG.standard_normal((2, 3, 4, 5, 6)).astype(np.float32)


def test_both_rows_of_an_image_are_neighbours():
    rows = interleave(jnp.asarray(UNCONDITIONAL), jnp.asarray(CONDITIONAL))
    assert rows.shape == (6, 4, 5, 6)
    np.testing.assert_array_equal(rows[0::2], UNCONDITIONAL)
    np.testing.assert_array_equal(rows[1::2], CONDITIONAL)
    np.testing.assert_array_equal(double(jnp.asarray(CONDITIONAL)), np.repeat(CONDITIONAL, 2, axis=0))


@pytest.mark.parametrize("scale", [np.float32(7.5), np.float32(-1), np.array([0, 1, 10], np.float32)])
def test_guidance_extrapolates(scale):
    out = guide(interleave(jnp.asarray(UNCONDITIONAL), jnp.asarray(CONDITIONAL)), jnp.asarray(scale))
    weight = scale.reshape(-1, 1, 1, 1).astype(np.float64)
    want = UNCONDITIONAL + weight * (CONDITIONAL.astype(np.float64) - UNCONDITIONAL)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)


def test_half_precision_is_combined_in_float32():
    rows = interleave(jnp.asarray(UNCONDITIONAL, jnp.bfloat16), jnp.asarray(CONDITIONAL, jnp.bfloat16))
    out = guide(rows, jnp.float32(10))
    assert out.dtype == jnp.float32
    low, high = (np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (UNCONDITIONAL, CONDITIONAL))
    np.testing.assert_allclose(out, low + 10 * (high - low), rtol=1e-5, atol=1e-5)
