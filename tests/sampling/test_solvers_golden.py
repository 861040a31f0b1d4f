"""Solvers against recorded grids and trajectories of the original and of diffusers, stepped and in one loop."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.sampling.trajectories import BIAS, DIFFERENT, PUBLISHED, SHAPE, config_of, rows, run
from unclip_jax.sampling.solvers import (
    ldm_ddim,
    ldm_dpm,
    make_solver,
)
from unclip_jax.sampling.solvers.ldm import continuous_grid
from unclip_jax.sampling.solvers.settings import SCHEDULE_DEFAULTS, noise_schedule, read_settings

pytestmark = pytest.mark.usefixtures("fully_compiled")

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = np.load(FOLDER / "schedules.npz")
REPLAYS = json.loads((FOLDER / "schedules.json").read_text())["replays"]


@pytest.mark.parametrize("steps", [1, 4, 20, 30, 75, 250])
def test_ldm_ddim_grid_is_the_originals(steps):
    grid = ldm_ddim(PUBLISHED, steps, eta=1.0).grid
    name = f"ldm_ddim_{steps}"
    np.testing.assert_array_equal(grid["timestep"][::-1], GOLDEN[f"{name}_timesteps"])
    np.testing.assert_array_equal(grid["alpha_cumprod"][::-1], GOLDEN[f"{name}_alpha"])
    np.testing.assert_allclose(grid["x0"][::-1] ** 2, GOLDEN[f"{name}_alpha_prev"], rtol=2e-7)
    # Measured 6e-8; 1.4e-7 for one step, where the original divides in float32.
    np.testing.assert_allclose(grid["noise"][::-1], GOLDEN[f"{name}_eta1_sigma"], rtol=0, atol=2e-7)


@pytest.mark.parametrize("steps", [5, 20])
def test_ldm_dpm_grid_is_the_originals(steps):
    times, log_alpha = continuous_grid(noise_schedule(read_settings(PUBLISHED, SCHEDULE_DEFAULTS)), steps)
    sigma = np.sqrt(-np.expm1(2 * log_alpha))
    np.testing.assert_array_equal(times, GOLDEN[f"ldm_dpm_{steps}_t"])
    np.testing.assert_array_equal(ldm_dpm(PUBLISHED, steps).grid["timestep"], GOLDEN[f"ldm_dpm_{steps}_t_input"][:-1])
    # Measured 1e-7, 5e-8 and 2e-7: float32's rounding in the original.
    np.testing.assert_allclose(log_alpha, GOLDEN[f"ldm_dpm_{steps}_log_alpha"], rtol=3e-7)
    np.testing.assert_allclose(sigma, GOLDEN[f"ldm_dpm_{steps}_sigma"], rtol=5e-7)
    np.testing.assert_allclose(log_alpha - np.log(sigma), GOLDEN[f"ldm_dpm_{steps}_lambda"], rtol=0, atol=5e-7)


@pytest.mark.parametrize("case", REPLAYS)
def test_each_step_repeats_the_originals_trajectory(case):
    meta = REPLAYS[case]
    x, out = GOLDEN[f"replay_{case}_x"], GOLDEN[f"replay_{case}_out"]
    noise = GOLDEN.get(f"replay_{case}_noise", np.zeros_like(out))
    config = {**PUBLISHED, "prediction_type": meta["prediction_type"]}
    solver = make_solver(meta["scheduler"], config, meta["steps"], meta["eta"])
    assert solver.calls == len(out)
    state = solver.init(jnp.asarray(x[0]))
    for i, row in enumerate(rows(solver)):
        after, state = solver.step(solver.prediction_type, state, jnp.asarray(x[i]), jnp.asarray(out[i]), row, noise[i])
        # Measured 5e-7.
        np.testing.assert_allclose(after, x[i + 1], rtol=0, atol=2e-6 * np.abs(x[i + 1]).max())


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("name", ["ddim", "ddim_eta1", "pndm", "dpm++2m", "dpm++2m-karras"])
def test_whole_trajectories_are_diffusers(name, steps):
    solver = make_solver(name.removesuffix("_eta1"), PUBLISHED, steps, eta=float(name.endswith("_eta1")))
    np.testing.assert_array_equal(solver.grid["timestep"], GOLDEN[f"trajectory_{name}_{steps}_timesteps"])
    end = GOLDEN[f"trajectory_{name}_{steps}_end"]
    ours = run(solver, GOLDEN["trajectory_start"], GOLDEN["trajectory_noise"])
    # Measured 5e-7; both sides round in float32.
    np.testing.assert_allclose(ours, end, rtol=0, atol=5e-6 * np.abs(end).max())


@pytest.mark.parametrize("name", DIFFERENT)
def test_scanned_and_stepped_loops_agree(name):
    solver, x = (
        make_solver(name, config_of(name), 6),
        np.linspace(-1, 1, np.prod(SHAPE), dtype=np.float32).reshape(SHAPE),
    )

    def body(carry, row):
        noise = jnp.zeros_like(x) if solver.stochastic else None
        out = jnp.tanh(0.8 * carry[0] + BIAS * (row["timestep"] / 1000))
        return solver.step(solver.prediction_type, carry[1], carry[0], out, row, noise), None

    (scanned, _), _ = jax.lax.scan(body, (jnp.asarray(x) * solver.scale, solver.init(x)), solver.grid)
    np.testing.assert_allclose(scanned, run(solver, x), rtol=0, atol=2e-6)
