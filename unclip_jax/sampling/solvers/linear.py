"""The step of every solver whose next x is a weighted sum, with the grid as the weights: all solvers but PNDM.

In each evaluation, over the values that have a column:

    next x      = sum of row[name] * value
    next memory = sum of row["keep_" + name] * value, placed before what was kept earlier

A value is "x", "x0" or "eps" (both from the network's output), "noise", or "memory", "memory_2", ..., newest first.
Columns that a solver does not have cost nothing.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.sampling.schedule import to_x0_eps
from unclip_jax.sampling.solvers.solver import Init, Row, Solver
from unclip_jax.sampling.solvers.thresholding import threshold

Memory = tuple[jax.Array, ...]


def table(
    grid: Mapping[str, np.ndarray],
    prediction_type: str,
    *,
    remembers: int = 0,
    stochastic: bool = False,
    scale: np.floating | None = None,
    start_alpha_cumprod: np.floating | float | None = None,
) -> Solver:
    """The solver whose weights are `grid`, and which keeps `remembers` arrays.

    Args:
        grid: The columns, (calls,) each, from `solver.make_grid`.
        prediction_type: See `Solver`.
        stochastic: See `Solver`.
        remembers: The number of arrays to keep.
        scale: See `Solver`; None for 1.
        start_alpha_cumprod: See `Solver`; None for the noise level of the first evaluation.

    Returns:
        The solver.
    """
    start = grid["alpha_cumprod"][0] if start_alpha_cumprod is None else start_alpha_cumprod
    return Solver(
        grid=grid,
        prediction_type=prediction_type,
        init=remember(remembers),
        step=step,
        stochastic=stochastic,
        start_alpha_cumprod=np.float32(start),
        scale=np.float32(1 if scale is None else scale),
    )


@functools.cache
def remember(count: int) -> Init:
    """The `Solver.init` of a solver that keeps `count` arrays like x, zeros at first."""
    return functools.partial(_zeros, count)


def _zeros(count: int, x: jax.Array) -> Memory:
    return (jnp.zeros(x.shape, jnp.float32),) * count


def step(
    prediction_type: str, state: Memory, x: jax.Array, out: jax.Array, row: Row, noise: jax.Array | None
) -> tuple[jax.Array, Memory]:
    """One step, see `Solver.step`.

    x0 is clamped to +-row["clip"] or dynamically thresholded if the row has those columns.

    Raises:
        ValueError: The solver is stochastic and noise is None.
    """
    x0, eps = to_x0_eps(prediction_type, out, x, row["alpha_cumprod"])
    if "clip" in row:
        x0 = jnp.clip(x0, -row["clip"], row["clip"])
    if "threshold_ratio" in row:
        x0 = threshold(x0, row)
    values = {"x": x.astype(jnp.float32), "x0": x0, "eps": eps}
    values |= {"memory" if i == 0 else f"memory_{i + 1}": kept for i, kept in enumerate(state)}
    if "noise" in row:
        if noise is None:
            raise ValueError("noise is None; this solver takes noise at every step (zeros for none)")
        values["noise"] = noise
    kept = (_weighted(values, row, "keep_"), *state[:-1]) if state else ()
    return _weighted(values, row, ""), kept


def _weighted(values: Mapping[str, jax.Array], row: Row, prefix: str) -> jax.Array:
    terms = [row[prefix + name] * value for name, value in values.items() if prefix + name in row]
    return functools.reduce(jnp.add, terms)
