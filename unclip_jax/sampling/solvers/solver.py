"""What all solvers share: a grid of numbers, and a pure step over one row of it."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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
    """The arguments of `unclip_jax.sampling.make_solver` that made a solver."""

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
    """A solver with a fixed number of steps: a pytree whose arrays are the grid; everything else is static.

    Args:
        grid: name -> (calls,) array, one row for each network evaluation. Always there: "index", int32, 0, 1, ...;
            "timestep", float32, which the network is given; "alpha_cumprod", float32, the noise level of the network's
            x. If there is "known_noise", it is the noise's weight in a known part of the image that is put into x after
            the evaluation, instead of the next level's. The other columns belong to `step`. Every number that a user
            may change (eta, thresholds) is a value here: none is compiled in.
        prediction_type: "epsilon", "v_prediction" or "sample": how `step` reads the network's output.
        init: init(x) -> state, what the first step needs: () or a tuple of arrays.
        step: step(prediction_type, state, x, out, row, noise) -> (next x, next state). x: (B, H, W, C) float32; out:
            the network's output for it, of any float dtype; row: the evaluation's row of the grid, scalars; noise:
            standard normal like x, or None unless `stochastic`. Pure and traceable, float32 inside.
        stochastic: Whether every step takes noise.
        start_alpha_cumprod: a, () float32. A run from an image's latents z starts at sqrt(a) z + sqrt(1 - a) noise. It
            is the noise level of the first evaluation, except for "ldm-ddim", which starts one level above it, or from
            pure noise (a is 0) when no step is left out.
        scale: The factor of the initial noise, for solvers whose first noise level does not include the image's share.
        reference: The reference whose procedure a pipeline follows around the loop with this solver.
        recipe: The arguments that made it, so that a pipeline can make it again with fewer steps; None for a solver of
            your own, and inside compiled programs.
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
        """The number of network evaluations (NFE); some solvers need more than one per step."""
        return self.grid["index"].shape[0]

    @property
    def steps(self) -> np.ndarray:
        """(calls,) int32: the step of each network evaluation. Those that repeat a timestep belong to one step."""
        timesteps = np.asarray(self.grid["timestep"])
        return np.concatenate([[0], np.cumsum(timesteps[1:] != timesteps[:-1])]).astype(np.int32)


def without_grid(solver: Solver) -> Solver:
    """The solver as programs take it that are given the grid apart: one of any number of steps is the same to them."""
    return replace(solver, grid={})


def make_grid(
    timesteps: np.ndarray, alpha_cumprod: np.ndarray, start_step: int = 0, /, **columns: np.ndarray | float
) -> dict[str, np.ndarray]:
    """Makes a grid of float32 columns and the index; a scalar column is repeated.

    Args:
        timesteps: (calls,).
        alpha_cumprod: (calls,).
        start_step: The number of rows to leave out at the start. The index counts the rows that are left.
        **columns: (calls,) or scalars.

    Returns:
        name -> (calls - start_step,).
    """
    calls = len(timesteps)
    floats = {"timestep": timesteps, "alpha_cumprod": alpha_cumprod, **columns}
    grid = {name: np.broadcast_to(np.asarray(column, np.float32), (calls,)) for name, column in floats.items()}
    return {
        "index": np.arange(calls - start_step, dtype=np.int32),
        **{name: column[start_step:] for name, column in grid.items()},
    }
