"""AdamW as in the model card, built from optax: warm-up, clipping, accumulation."""

from typing import Literal, get_args

import optax

Decay = Literal["constant", "cosine", "linear"]


def learning_rate(
    peak: float, warmup_steps: int = 0, decay: Decay = "constant", total_steps: int | None = None
) -> optax.Schedule:
    """A schedule of the learning rate: from 0 to `peak` linearly, then as `decay` says, to 0 at `total_steps`.

    The model card's is `learning_rate(1e-4, 10_000)`.

    Args:
        peak: The highest rate.
        warmup_steps: The length of the linear rise.
        decay: The shape after it.
        total_steps: Where a decay ends.

    Returns:
        Optimiser step -> rate.

    Raises:
        ValueError: The peak is not positive, a number of steps is negative, the decay is unknown, or a decay other than
            constant lacks a later `total_steps`.
    """
    if not peak > 0 or warmup_steps < 0:
        raise ValueError(f"learning rate is {peak}, warmup_steps {warmup_steps}; want above 0, and 0 or more")
    if decay not in get_args(Decay):
        raise ValueError(f"decay is {decay!r}; accepted: {', '.join(get_args(Decay))}")
    if decay == "constant":
        after: optax.Schedule = optax.constant_schedule(peak)
    else:
        if total_steps is None or total_steps <= warmup_steps:
            raise ValueError(
                f"total_steps is {total_steps}; want more than warmup_steps, {warmup_steps}, with {decay} decay"
            )
        length = total_steps - warmup_steps
        cosine = optax.cosine_decay_schedule(peak, length)
        after = cosine if decay == "cosine" else optax.linear_schedule(peak, 0.0, length)
    if not warmup_steps:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), after], [warmup_steps])


def adamw(
    rate: optax.ScalarOrSchedule,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    max_grad_norm: float | None = None,
    accumulate: int = 1,
) -> optax.GradientTransformation:
    """AdamW with PyTorch's defaults and arithmetic (Loshchilov & Hutter 2019, arXiv:1711.05101).

    Moments are kept in the dtype of the weights: give it float32 masters.

    Args:
        rate: The learning rate or its schedule.
        betas: As in PyTorch.
        eps: As in PyTorch.
        weight_decay: As in PyTorch.
        max_grad_norm: Gradients are scaled down to this global norm; None leaves them.
        accumulate: The number of batches whose mean gradient makes one step.

    Returns:
        The optimiser.

    Raises:
        ValueError: A number is out of range.
    """
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm is {max_grad_norm}; want a positive number, or None")
    if accumulate < 1:
        raise ValueError(f"accumulate is {accumulate}; want at least 1")
    clip = [] if max_grad_norm is None else [optax.clip_by_global_norm(max_grad_norm)]
    steps = optax.chain(*clip, optax.adamw(rate, *betas, eps, weight_decay=weight_decay))
    return steps if accumulate == 1 else optax.MultiSteps(steps, accumulate).gradient_transformation()
