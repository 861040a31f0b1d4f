"""One step of training, compiled: gradients, the optimiser's move, the averages; and the state that it moves."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from unclip_jax.training.ema import EMA, init_ema, update_ema

# (trainable parameters, batch, step) -> each image's loss (B,), and means to report.
Losses = Callable[[Any, Any, jax.Array], tuple[jax.Array, Mapping[str, jax.Array]]]


class TrainState(NamedTuple):
    """What a run goes on from: everything that a step changes, and nothing else.

    step: (), int32, steps done. params: the trainable weights, float32. opt_state: the optimiser's. average: of the
    weights, or None.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    average: EMA | None


def start_training(params: Any, optimizer: optax.GradientTransformation, *, average: bool = True) -> TrainState:
    """The state before the first step. params: float32 masters; frozen weights are no part of it."""
    return TrainState(jnp.int32(0), params, optimizer.init(params), init_ema(params) if average else None)


def train_step(
    losses: Losses,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Any,
    *,
    ema_decay: float = 0.9999,
    expected_step: jax.Array | int | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Moves the state by one batch; compile it with `jax.jit`, the state donated.

    losses: given the step's number, so that random numbers can come from (seed, step, place in the batch). Returns the
    new state, and "loss", "grad_norm" and what `losses` reports. Where loss or gradient is not finite, the state comes
    back as it was, so that whoever stops there still has the last good one. expected_step: a state at another step
    comes back as it was, too: so a loop that looks at its losses late still stops at the first that is not finite.
    """

    def mean(params: Any) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        each, report = losses(params, batch, state.step)
        return each.mean(), report

    (loss, report), gradients = jax.value_and_grad(mean, has_aux=True)(state.params)
    norm = optax.tree.norm(gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    average = None if state.average is None else update_ema(state.average, params, ema_decay)
    moved = TrainState(state.step + 1, params, opt_state, average)
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    if expected_step is not None:
        good &= state.step == expected_step
    kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), moved, state)
    return kept, {"loss": loss, "grad_norm": norm, **report}
