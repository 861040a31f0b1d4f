"""Whole trajectories with an analytic network, one step at a time: what the solver tests share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.sampling.loop import start
from unclip_jax.sampling.solvers import PUBLISHED_UNCLIP_SCHEDULER, SCHEDULERS, Solver
from unclip_jax.sampling.solvers.sigmas import SPACINGS

PUBLISHED = {key: value for key, value in PUBLISHED_UNCLIP_SCHEDULER.items() if not key.startswith("_")}
# Of the solvers that differ in the spacing of their noise levels alone, each spacing once.
DIFFERENT = [name for name in SCHEDULERS if not name.endswith((*SPACINGS, "lu", "sgm-uniform"))]
DIFFERENT += ["dpm++2m-karras", "euler-karras", "heun-exponential", "lms-beta", "dpm++2m-sde-lu", "unipc-sgm-uniform"]
SHAPE = (2, 5, 3, 4)  # (B, H, W, C)
BIAS = np.cos(np.arange(np.prod(SHAPE), dtype=np.float64) * 1.7).reshape(SHAPE).astype(np.float32)


def network(x: Any, timestep: Any, library: Any, bias: Any) -> Any:
    """A smooth function of x and of the timestep, the same in jax.numpy and in torch."""
    return library.tanh(0.8 * x + bias * (float(timestep) / 1000))


def config_of(name: str) -> dict[str, Any]:
    """The published configuration, of noise for the solver that takes no v."""
    return {**PUBLISHED, "prediction_type": "epsilon"} if name == "ldm-plms" else PUBLISHED


def rows(solver: Solver) -> list[dict[str, np.ndarray]]:
    return [{name: column[i] for name, column in solver.grid.items()} for i in range(solver.calls)]


def run(
    solver: Solver,
    x: np.ndarray,
    noise: np.ndarray | None = None,
    predict: Callable[[jax.Array, dict[str, np.ndarray]], jax.Array] | None = None,
    clean: np.ndarray | None = None,
) -> np.ndarray:
    """The end of a trajectory from x, or from x on `clean`; noise: (calls, ...), read by stochastic solvers only."""
    step = jax.jit(solver.step, static_argnums=0)
    carry = start(solver, jnp.asarray(x), clean)
    latents, state = carry.latents, carry.state
    for i, row in enumerate(rows(solver)):
        out = predict(latents, row) if predict else network(latents, row["timestep"], jnp, BIAS)
        draw = (np.zeros_like(x) if noise is None else noise[i]) if solver.stochastic else None
        latents, state = step(solver.prediction_type, state, latents, out, row, draw)
    return np.asarray(latents)
