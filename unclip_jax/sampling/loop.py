"""The sampling loop: one compiled scan over a solver's grid. It knows no network, only a function that predicts."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from unclip_jax.sampling.noise import Branch, draw
from unclip_jax.sampling.schedule import add_noise, to_x0_eps
from unclip_jax.sampling.solvers.solver import Row, Solver, State

Denoise = Callable[[jax.Array, Row], jax.Array]
StatefulDenoise = Callable[[jax.Array, Row, State], tuple[jax.Array, State]]
Between = Callable[[jax.Array, Row], jax.Array]


class Carry(NamedTuple):
    """The state of a run between two steps.

    Attributes:
        latents: (B, ...) float32.
        state: The solver's state.
        x0: (B, ...), the last prediction of the clean latents.
        guidance_state: What the prediction keeps from one evaluation to the next; () for nothing.
    """

    latents: jax.Array
    state: State
    x0: jax.Array
    guidance_state: State = ()


def start(solver: Solver, latents: jax.Array, clean: jax.Array | None = None, *, guidance_state: State = ()) -> Carry:
    """Builds the state of a run before its first step, from pure noise or from an image.

    Args:
        solver: The solver that will run.
        latents: (B, ...), standard normal noise.
        clean: (B, ...), an image's latents, to which the noise is added at the level of the solver's start. None: pure
            noise.
        guidance_state: The prediction's initial state, see `run_stateful_steps`.

    Returns:
        The `Carry` to give to `run_steps` or `run_stateful_steps`.
    """
    if clean is None:
        latents = latents.astype(jnp.float32) * solver.scale
    else:
        latents = add_noise(clean, latents, jnp.asarray(solver.start_alpha_cumprod))
    return Carry(latents, solver.init(latents), latents, guidance_state)


def run_steps(
    denoise: Denoise,
    solver: Solver,
    carry: Carry,
    rows: Mapping[str, jax.Array],
    keys: jax.Array | None = None,
) -> Carry:
    """Runs the steps of `rows`, a slice of the solver's grid, in one `lax.scan`.

    Args:
        denoise: (latents, row) -> prediction of the solver's type. row holds the scalars of one evaluation, among them
            "timestep" (float32) and "index" (int32).
        solver: The solver to run.
        carry: Where the run stands; `start` makes the first one.
        rows: name -> (calls, ...), the rows of the grid to run. A column "step_noise" (calls, B, ...) takes precedence
            over `keys`.
        keys: (B,) random keys, one per image, for stochastic solvers.

    Returns:
        The `Carry` after these steps.

    Raises:
        ValueError: The solver is stochastic and gets neither keys nor "step_noise".
    """
    return run_stateful_steps(lambda x, row, state: (denoise(x, row), state), solver, carry, rows, keys)


def run_stateful_steps(
    denoise: StatefulDenoise,
    solver: Solver,
    carry: Carry,
    rows: Mapping[str, jax.Array],
    keys: jax.Array | None = None,
    between: Between | None = None,
    span: tuple[jax.Array, jax.Array] | None = None,
) -> Carry:
    """`run_steps` for a prediction that depends on earlier ones (`unclip_jax.sampling.guidance.guided`).

    Args:
        denoise: (latents, row, guidance_state) -> prediction, guidance_state. The first state is the one given to
            `start`. A solver that evaluates the network twice per step updates it twice.
        solver: As in `run_steps`.
        carry: As in `run_steps`.
        rows: As in `run_steps`.
        keys: As in `run_steps`.
        between: (next latents, row) -> the latents that the next step starts from.
        span: () int32 each, the first of `rows` to run and the one after the last: traced, so that other spans compile
            nothing, but have no reverse-mode gradient. None: all.

    Returns:
        The `Carry` after these steps.

    Raises:
        ValueError: The solver is stochastic and gets neither keys nor "step_noise".
    """
    if solver.stochastic and keys is None and "step_noise" not in rows:
        raise ValueError("keys is None; this solver is stochastic: want keys, one per image, or step_noise")

    def step(carry: Carry, row: Row) -> Carry:
        x, state, _, guidance_state = carry
        out, guidance_state = denoise(x, row, guidance_state)
        noise = row.get("step_noise")
        if solver.stochastic and keys is not None and noise is None:
            noise = draw(keys, Branch.STEP, x.shape[1:], row["index"])
        x0, _ = to_x0_eps(solver.prediction_type, out, x, row["alpha_cumprod"])
        x, state = solver.step(solver.prediction_type, state, x, out, row, noise)
        if between is not None:
            x = between(x, row)
        return Carry(x, state, x0, guidance_state)

    if span is None:
        return jax.lax.scan(lambda carry, row: (step(carry, row), None), carry, dict(rows))[0]
    return jax.lax.fori_loop(
        *span, lambda i, carry: step(carry, {name: column[i] for name, column in rows.items()}), carry
    )


def sample(
    denoise: Denoise,
    solver: Solver,
    latents: jax.Array,
    *,
    keys: jax.Array | None = None,
    step_noise: jax.Array | None = None,
) -> jax.Array:
    """Samples from pure noise to the end of the solver's grid. Composes with jit, grad, vmap, pmap and shard_map.

        solver = make_solver("ddim", PUBLISHED_UNCLIP_SCHEDULER, 20)
        images = sample(lambda x, row: network(x, row["timestep"]), solver, noise, keys=keys)

    Args:
        denoise: (latents, row) -> prediction, see `run_steps`.
        solver: The solver to run.
        latents: (B, ...), standard normal noise.
        keys: (B,) random keys for stochastic solvers, see `unclip_jax.sampling.noise.image_keys`.
        step_noise: (solver.calls, B, ...), the noise of stochastic solvers, instead of keys.

    Returns:
        (B, ...) float32, the latents at the end of the grid.

    Raises:
        ValueError: The solver is stochastic and gets neither keys nor step_noise.
    """
    rows = {name: jnp.asarray(column) for name, column in solver.grid.items()}
    if step_noise is not None and solver.stochastic:
        rows["step_noise"] = step_noise
    return run_steps(denoise, solver, start(solver, latents), rows, keys).latents
