"""The exponential moving average (EMA) of weights, with the original's rule for the first updates."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class EMA(NamedTuple):
    """The averaged weights.

    Attributes:
        params: A pytree like the weights, in float32.
        updates: (), int32, the number of updates so far.
    """

    params: Any
    updates: jax.Array


def init_ema(params: Any) -> EMA:
    """An EMA that starts at the weights themselves."""
    return EMA(jax.tree.map(lambda p: jnp.array(p, jnp.float32), params), jnp.int32(0))


def update_ema(average: EMA, params: Any, decay: float = 0.9999) -> EMA:
    """Moves the average towards `params`.

    Update n has decay min(decay, (1 + n) / (10 + n)), so early weights are soon forgotten. Source: the original's
    `LitEma`.

    Args:
        average: The EMA so far.
        params: The current weights.
        decay: The highest decay.

    Returns:
        The next EMA.
    """
    updates = average.updates + 1
    share = 1 - jnp.minimum(decay, (1 + updates) / (10 + updates)).astype(jnp.float32)
    moved = jax.tree.map(lambda a, p: a - share * (a - p.astype(jnp.float32)), average.params, params)
    return EMA(moved, updates)
