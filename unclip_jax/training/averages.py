"""Exponential moving averages of weights, with the original's rule for the first updates."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Average(NamedTuple):
    """params: the averages, a pytree as that of the weights, in float32. updates: (), int32, how many there were."""

    params: Any
    updates: jax.Array


def start_average(params: Any) -> Average:
    """Begins with the weights themselves."""
    return Average(jax.tree.map(lambda p: jnp.array(p, jnp.float32), params), jnp.int32(0))


def update_average(average: Average, params: Any, decay: float = 0.9999) -> Average:
    """Moves the averages towards `params`. Update n has decay min(decay, (1 + n) / (10 + n)): early weights are soon
    forgotten. Source: the original's `LitEma`."""
    updates = average.updates + 1
    share = 1 - jnp.minimum(decay, (1 + updates) / (10 + updates)).astype(jnp.float32)
    moved = jax.tree.map(lambda a, p: a - share * (a - p.astype(jnp.float32)), average.params, params)
    return Average(moved, updates)
