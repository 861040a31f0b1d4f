"""PNDM (Liu et al. 2022, arXiv:2202.09778) as diffusers' PNDMScheduler runs it: the solver of the published unCLIP."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.sampling.schedule import alphas_cumprod, to_x0_eps
from unclip_jax.sampling.solvers.settings import (
    SCHEDULE_DEFAULTS,
    check_start_step,
    check_steps,
    noise_schedule,
    read_settings,
    spaced_timesteps,
)
from unclip_jax.sampling.solvers.solver import Row, Solver, make_grid

DEFAULTS = {
    **SCHEDULE_DEFAULTS,
    "skip_prk_steps": False,
    "set_alpha_to_one": False,
    "timestep_spacing": "leading",
    "steps_offset": 0,
}

# Adams-Bashforth: weights of the newest output and the ones before it, by how many there are.
ADAMS = {
    1: (1, 0, 0, 0),
    2: (3 / 2, -1 / 2, 0, 0),
    3: (23 / 12, -16 / 12, 5 / 12, 0),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)


def pndm(config: Mapping[str, Any], num_inference_steps: int, start_step: int = 0) -> Solver:
    """PNDM: a linear multistep method of fourth order over the network's outputs.

    Outputs are combined as they come and converted afterwards, v-predictions too.

    With skip_prk_steps (PLMS, as in every Stable Diffusion) the first step is made twice, the second time with the mean
    of two outputs: num_inference_steps + 1 network evaluations, but one evaluation for one step. Without it the first
    three steps are Runge-Kutta's, of four evaluations each: num_inference_steps + 9 evaluations and at least 4 steps.

    Args:
        config: A diffusers scheduler_config.json.
        num_inference_steps: Steps, 1 (without skip_prk_steps: 4) to the number of training timesteps.
        start_step: The number of evaluations to leave out. As in diffusers, the remaining ones are counted from the
            first of them. With skip_prk_steps the first two make one step, whichever they are: from the third on, the
            network is given timesteps one step below the noise level of its x (except with start_step 1, where the
            repeated timestep comes first). Without it the first twelve are Runge-Kutta's, and x is treated as if it
            were at the first timesteps of the schedule, whatever its noise level is.

    Returns:
        The solver; it is deterministic.

    Raises:
        ValueError: A setting or a number is out of range.
    """
    settings = read_settings(config, DEFAULTS, {"prediction_type": ("epsilon", "v_prediction")})
    table = alphas_cumprod(noise_schedule(settings))
    least = 1 if settings["skip_prk_steps"] else 4
    count = check_steps(num_inference_steps, len(table), least, "'pndm' with skip_prk_steps false" if least > 1 else "")
    stride = len(table) // count
    falling = spaced_timesteps(settings, count)
    start_step = check_start_step(start_step, count)
    if settings["skip_prk_steps"]:
        timesteps, source, target, columns = _multistep_calls(falling, stride, start_step)
    else:
        timesteps, source, target, columns = _runge_kutta_calls(falling, stride, start_step)
    here = table[source]
    there = np.where(target >= 0, table[target], np.float32(1) if settings["set_alpha_to_one"] else table[0])
    if not here.all():
        raise ValueError("scheduler config: 'pndm' cannot start from a zero signal-to-noise ratio (trained_betas)")
    return Solver(
        grid=make_grid(
            timesteps,
            table[timesteps],
            source_alpha_cumprod=here,
            x=np.sqrt(there / here),
            eps=(here - there) / (here * np.sqrt(1 - there) + np.sqrt(here * (1 - here) * there)),
            **columns,
        ),
        prediction_type=settings["prediction_type"],
        init=init,
        step=step,
        stochastic=False,
        start_alpha_cumprod=table[timesteps[0]],
    )


Calls = tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]


def _multistep_calls(falling: np.ndarray, stride: int, start_step: int) -> Calls:
    """For each evaluation: its timestep, where its step starts and ends, and the weights."""
    timesteps = np.insert(falling, 1, falling[1:2])[start_step:]
    source, target = timesteps.copy(), timesteps - stride
    columns = _columns(len(timesteps))
    for call in range(len(timesteps)):
        if call == 1:
            # Back to the start, with the mean of the outputs at both ends of the step; this output is not kept.
            source[call], target[call] = timesteps[call] + stride, timesteps[call]
            columns["outputs"][call] = (1 / 2, 1 / 2, 0, 0)
            columns["restart"][call] = 1
        else:
            columns["outputs"][call] = ADAMS[min(max(call, 1), 4)]
            columns["keep"][call] = 1
    columns["save"][0] = 1
    return timesteps, source, target, _flat(columns)


def _runge_kutta_calls(falling: np.ndarray, stride: int, start_step: int) -> Calls:
    half = stride // 2
    ends = falling[1:4]
    # Each step's four calls: at its start, twice in its middle, at its end.
    first = np.stack([falling[:3], ends + half, ends + half, ends], axis=1)  # (3 steps, 4 calls)
    timesteps = np.concatenate([first.ravel(), falling[3:]])[start_step:]
    source, target = timesteps.copy(), timesteps - stride
    count = len(source[:12])
    source[:12] = np.repeat(falling[:3], 4)[:count]
    target[:12] = timesteps[:12] - np.tile([half, 0], 6)[:count]
    columns = _columns(12 + len(falling))
    columns["outputs"][:12, 0] = np.tile([1, 1, 1, RUNGE_KUTTA[3]], 3)
    columns["outputs"][12:] = ADAMS[4]
    columns["sum"][:12] = np.tile([0, 0, 0, 1], 3)
    columns["sum_keep"][:12] = np.tile([0, 1, 1, 0], 3)
    columns["sum_add"][:12] = np.tile([*RUNGE_KUTTA[:3], 0], 3)
    columns["save"][:12] = columns["keep"][:12] = np.tile([1, 0, 0, 0], 3)
    columns["restart"][:12] = np.tile([0, 1, 1, 1], 3)
    columns["keep"][12:] = 1
    return timesteps, source, target, _flat({name: column[: len(timesteps)] for name, column in columns.items()})


def _columns(calls: int) -> dict[str, np.ndarray]:
    names = ("save", "restart", "keep", "sum", "sum_keep", "sum_add")
    return {"outputs": np.zeros((calls, 4)), **{name: np.zeros(calls) for name in names}}


def _flat(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    outputs = columns.pop("outputs")
    return {**columns, **{f"output{i}": outputs[:, i] for i in range(4)}}


def init(x: jax.Array) -> tuple[jax.Array, ...]:
    """The x that steps restart from, the running Runge-Kutta sum, and the last three outputs, newest first."""
    return (jnp.zeros(x.shape, jnp.float32),) * 5


def step(
    prediction_type: str, state: tuple[jax.Array, ...], x: jax.Array, out: jax.Array, row: Row, noise: jax.Array | None
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """One evaluation's part of a PNDM step (formula 9 of the paper). See `Solver.step`."""
    x, out = x.astype(jnp.float32), out.astype(jnp.float32)
    saved, total, newest, middle, oldest = state
    start = jnp.where(row["restart"] > 0, saved, x)
    saved = jnp.where(row["save"] > 0, x, saved)
    combined = row["output0"] * out + row["output1"] * newest + row["output2"] * middle + row["output3"] * oldest
    combined = combined + row["sum"] * total
    total = row["sum_keep"] * total + row["sum_add"] * out
    newest, middle, oldest = (
        jnp.where(row["keep"] > 0, new, old)
        for new, old in zip((out, newest, middle), (newest, middle, oldest), strict=True)
    )
    _, eps = to_x0_eps(prediction_type, combined, start, row["source_alpha_cumprod"])
    return row["x"] * start + row["eps"] * eps, (saved, total, newest, middle, oldest)
