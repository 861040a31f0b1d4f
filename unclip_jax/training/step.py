"""One compiled training step (gradients, optimiser, EMA), and the state that it updates."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from unclip_jax.training.ema import EMA, init_ema, update_ema

# (trainable parameters, batch, step) -> each image's loss (B,), and means to report.
Losses = Callable[[Any, Any, jax.Array], tuple[jax.Array, Mapping[str, jax.Array]]]


class TrainState(NamedTuple):
    """What a run resumes from: everything that a step changes, and nothing else.

    Attributes:
        step: (), int32, steps done.
        params: The trainable weights, float32.
        opt_state: The optimiser's state.
        average: The weights' EMA, or None.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    average: EMA | None


def start_training(params: Any, optimizer: optax.GradientTransformation, *, average: bool = True) -> TrainState:
    """The state before the first step.

    Args:
        params: Trainable weights, float32 masters; frozen weights are not part of the state.
        optimizer: The optimiser.
        average: Keep an EMA.

    Returns:
        The state.
    """
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
    """Updates the state by one batch; compile it with `jax.jit`, with the state donated.

    If the loss or the gradient is not finite, the state is returned unchanged, so that a caller who stops there still
    has the last good one.

    Args:
        losses: Gets the step's number, so that random numbers can depend on (seed, step, position in the batch).
        optimizer: The optimiser.
        state: The state.
        batch: The batch.
        ema_decay: The EMA's highest decay.
        expected_step: A state at another step is returned unchanged, too. A loop that checks its losses late therefore
            still stops at the first that is not finite.

    Returns:
        The new state, and "loss", "grad_norm" and the metrics of `losses`.
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
