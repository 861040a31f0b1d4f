"""The compiler under us computes what it is told to: its known faults, which pyproject.toml keeps out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("fully_compiled")


def test_a_matrix_times_many_vectors_and_its_sum():
    """jax-ml/jax#39103: jaxlib 0.10.2 on a CPU takes the wrong row for the last of more than 32,768."""
    rows = np.arange(32_769, dtype=np.float32)[:, None] * np.float32([1, 0, 0])
    matrix = jnp.eye(3)
    squares = jax.jit(jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2)))(rows)
    np.testing.assert_array_equal(squares, (rows**2).sum(axis=1))
