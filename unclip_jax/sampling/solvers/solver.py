"""What all solvers have in common: a grid of numbers and a pure step over one row of it."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from unclip_jax.reference import Reference

State = Any
Row = Mapping[str, jax.Array]
Init = Callable[[jax.Array], State]
Step = Callable[[str, State, jax.Array, jax.Array, Row, jax.Array | None], tuple[jax.Array, State]]


@dataclass(frozen=True)
class Recipe:
    """What `unclip_jax.sampling.make_solver` made a solver from: its arguments."""

    name: str
    config: Mapping[str, Any]
    num_inference_steps: int
    eta: float
    start_step: int
    own: bool


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["grid", "start_alpha_cumprod", "scale"],
    meta_fields=["prediction_type", "init", "step", "stochastic", "reference"],
    drop_fields=["recipe"],
)
@dataclass(frozen=True, eq=False)
class Solver:
    """A solver with a number of steps: a pytree whose arrays are the grid, all else being static.

    grid: name -> (calls,) array, one row for each network call. Always there: "index", int32, 0, 1, ...; "timestep",
        float32, what the network is told; "alpha_cumprod", float32, the noise level of the x it is given. Where there
        is "known_noise", it is the noise's weight in a known part of the picture that joins x after the call, instead
        of the next level's. All else belongs to `step`. Every number that a user may turn (eta, thresholds) is a value
        here: none is compiled in.
    prediction_type: "epsilon", "v_prediction" or "sample": how `step` reads the network's output
    init: init(x) -> state, what the first step needs: () or a tuple of arrays
    step: step(prediction_type, state, x, out, row, noise) -> (next x, next state). x: (B, H, W, C) float32; out: the
        network's output for it, of any float dtype; row: the call's row of the grid, scalars; noise: standard normal
        like x, or None unless `stochastic`. Pure and traceable, float32 inside.
    stochastic: whether every step takes noise
    start_alpha_cumprod: a, () float32: a run from a picture's latents z starts at sqrt(a) z + sqrt(1 - a) noise. The
        first call's noise level, but for "ldm-ddim", which starts one level above it, and from pure noise alone (a is
        0) when no step is left out
    scale: what the initial noise is multiplied by, for solvers that begin at a noise level without a picture's share
    reference: whose procedure a pipeline follows around the loop with this solver
    recipe: what made it, so that a pipeline can make it again with fewer steps; None for a solver of your own, and
        inside of compiled programs
    """

    grid: Mapping[str, jax.Array | np.ndarray]
    prediction_type: str
    init: Init
    step: Step
    stochastic: bool
    start_alpha_cumprod: jax.Array | np.floating
    scale: jax.Array | np.floating = np.float32(1)  # noqa: RUF009
    reference: Reference = Reference.DIFFUSERS
    recipe: Recipe | None = None

    @property
    def calls(self) -> int:
        """How often the network is called; some solvers need more calls than steps."""
        return self.grid["index"].shape[0]

    @property
    def steps(self) -> np.ndarray:
        """(calls,) int32: the step of each network call. Calls that repeat a timestep are of one step."""
        timesteps = np.asarray(self.grid["timestep"])
        return np.concatenate([[0], np.cumsum(timesteps[1:] != timesteps[:-1])]).astype(np.int32)


def make_grid(
    timesteps: np.ndarray, alpha_cumprod: np.ndarray, start_step: int = 0, /, **columns: np.ndarray | float
) -> dict[str, np.ndarray]:
    """A grid of float32 columns and the index; a scalar column is repeated.

    start_step: how many rows to leave out at the start; the index counts those that are left. timesteps, alpha_cumprod,
    columns: (calls,), of which (calls - start_step,) are returned.
    """
    calls = len(timesteps)
    floats = {"timestep": timesteps, "alpha_cumprod": alpha_cumprod, **columns}
    grid = {name: np.broadcast_to(np.asarray(column, np.float32), (calls,)) for name, column in floats.items()}
    return {
        "index": np.arange(calls - start_step, dtype=np.int32),
        **{name: column[start_step:] for name, column in grid.items()},
    }
