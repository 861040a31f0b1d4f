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
    """Where a run stands.

    latents: (B, ...) float32; state: the solver's; x0: the network's last guess of the end; guidance_state: what
    the prediction keeps from call to call, () for nothing.
    """

    latents: jax.Array
    state: State
    x0: jax.Array
    guidance_state: State = ()


def start(solver: Solver, latents: jax.Array, clean: jax.Array | None = None, *, guidance_state: State = ()) -> Carry:
    """A run before its first step, from pure noise or from an image.

    latents: standard normal noise (B, ...). clean: (B, ...), an image's latents, which get that noise at the level of
    the solver's start; None: none. guidance_state: see `run_stateful_steps`.
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
    """Runs the steps of `rows`, a slice of the solver's grid, under one `lax.scan`.

    denoise: (latents, row) -> prediction of the solver's type, where row holds one call's "timestep" (float32) and
        "index" (int32) among other scalars
    keys: (B,), one an image, for stochastic solvers; or rows has a column "step_noise" (calls, B, ...), which wins

    Raises ValueError when a stochastic solver gets neither.
    """
    return run_stateful_steps(lambda x, row, state: (denoise(x, row), state), solver, carry, rows, keys)


def run_stateful_steps(
    denoise: StatefulDenoise,
    solver: Solver,
    carry: Carry,
    rows: Mapping[str, jax.Array],
    keys: jax.Array | None = None,
    between: Between | None = None,
) -> Carry:
    """`run_steps` for a prediction that depends on earlier ones (`unclip_jax.sampling.guidance.guided`).

    denoise: (latents, row, guidance_state) -> prediction, guidance_state; the first state is what `start` was given.
        A solver that calls the network twice a step updates it twice.
    between: (next latents, row) -> what the next step is given in their place
    """
    if solver.stochastic and keys is None and "step_noise" not in rows:
        raise ValueError("this solver is stochastic: give keys, one an image, or step noise")

    def body(carry: Carry, row: Row) -> tuple[Carry, None]:
        x, state, _, guidance_state = carry
        out, guidance_state = denoise(x, row, guidance_state)
        noise = row.get("step_noise")
        if solver.stochastic and keys is not None and noise is None:
            noise = draw(keys, Branch.STEP, x.shape[1:], row["index"])
        x0, _ = to_x0_eps(solver.prediction_type, out, x, row["alpha_cumprod"])
        x, state = solver.step(solver.prediction_type, state, x, out, row, noise)
        if between is not None:
            x = between(x, row)
        return Carry(x, state, x0, guidance_state), None

    return jax.lax.scan(body, carry, dict(rows))[0]


def sample(
    denoise: Denoise,
    solver: Solver,
    latents: jax.Array,
    *,
    keys: jax.Array | None = None,
    step_noise: jax.Array | None = None,
) -> jax.Array:
    """Samples from pure noise to the end of the solver's grid. Pure: composes with jit, grad, vmap, pmap, shard_map.

    denoise: (latents, row) -> prediction, see `run_steps`. latents: (B, ...) standard normal. For stochastic solvers,
    keys: (B,) keys (see `unclip_jax.sampling.noise.image_keys`), or step_noise: (solver.calls, B, ...).
    Returns (B, ...) float32.

        solver = make_solver("ddim", PUBLISHED_UNCLIP_SCHEDULER, 20)
        images = sample(lambda x, row: network(x, row["timestep"]), solver, noise, keys=keys)
    """
    rows = {name: jnp.asarray(column) for name, column in solver.grid.items()}
    if step_noise is not None and solver.stochastic:
        rows["step_noise"] = step_noise
    return run_steps(denoise, solver, start(solver, latents), rows, keys).latents
