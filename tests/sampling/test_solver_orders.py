"""Orders of convergence on Gaussian data, where the probability flow has an exact solution."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.sampling.trajectories import PUBLISHED, rows, run
from unclip_jax.sampling.solvers import (
    ddim_inversion,
    make_solver,
)
from unclip_jax.sampling.solvers.dpmpp import multistep_columns

MEAN, VARIANCE = 0.3, 0.25


def _perfect_noise(x, row):
    a = row["alpha_cumprod"]
    x0 = MEAN + VARIANCE * jnp.sqrt(a) / (a * VARIANCE + 1 - a) * (x - jnp.sqrt(a) * MEAN)
    return (x - jnp.sqrt(a) * x0) / jnp.sqrt(1 - a)


def _flow(x, a, b):
    """Where the probability flow takes x from noise level a to noise level b."""
    return np.sqrt(b) * MEAN + np.sqrt((b * VARIANCE + 1 - b) / (a * VARIANCE + 1 - a)) * (x - np.sqrt(a) * MEAN)


def _slope(errors, counts):
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


@pytest.mark.parametrize(
    ("name", "order", "counts"),
    [
        ("ddim", 1, (20, 50, 100, 200)),  # measured 0.94
        ("ldm-ddim", 1, (20, 50, 100, 200)),  # measured 0.94
        ("pndm", 2, (20, 50, 100, 200)),
        ("ldm-plms", 2, (20, 50, 100, 200)),
        ("dpm++2m-karras", 2, (16, 32, 64, 128)),  # measured 2.09
    ],
)
def test_order_of_convergence(name, order, counts):
    config = {**PUBLISHED, "prediction_type": "epsilon", "final_sigmas_type": "sigma_min"}
    x, errors = np.linspace(-2, 2, 9, dtype=np.float32).reshape(1, 3, 3, 1), []
    for count in counts:
        solver = make_solver(name, config, count)
        exact = _flow(x.astype(np.float64), np.float64(solver.grid["alpha_cumprod"][0]), 0.99914998)
        errors.append(np.abs(run(solver, x, predict=_perfect_noise) - exact).max())
    assert _slope(errors, counts) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(
    ("name", "order", "counts"),
    [
        ("euler-karras", 1, (32, 64, 128, 256)),
        ("heun-karras", 2, (16, 32, 64, 128)),
        ("dpm2-karras", 2, (16, 32, 64, 128)),
        ("lms-karras", 3.6, (16, 32, 64, 128)),  # of order 4 but for its first three steps
        ("dpm++2s-karras", 2, (16, 32, 64, 128)),
        ("unipc-karras", 3, (16, 32, 64, 128)),  # predicted to second order and corrected: one more
        ("deis-karras", 2, (16, 32, 64, 128)),
    ],
)
def test_order_of_convergence_over_noise_levels(name, order, counts):
    """Down to the lowest noise level: the last step, to none at all, has an error that more steps do not make less."""
    x, errors = np.linspace(-2, 2, 9, dtype=np.float32).reshape(1, 3, 3, 1), []
    for count in counts:
        solver = make_solver(name, {**PUBLISHED, "prediction_type": "epsilon", "timestep_spacing": "linspace"}, count)
        start_step, end = (np.float64(solver.grid["alpha_cumprod"][i]) for i in (0, -1))
        solver = dataclasses.replace(solver, grid={key: column[:-1] for key, column in solver.grid.items()})
        exact = _flow(x.astype(np.float64) * solver.scale, start_step, end)
        errors.append(np.abs(run(solver, x, predict=_perfect_noise) - exact).max())
    assert _slope(errors, counts) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler-a", "dpm2-a"])
def test_what_draws_noise_ends_in_the_right_distribution(name):
    """Of a hundred thousand numbers; what is off is the methods' error at 999 steps: at most 2.6 % of the variance."""
    rng = np.random.default_rng(0)
    solver = make_solver(name, {**PUBLISHED, "prediction_type": "epsilon"}, 999, eta=1.0)
    x = jnp.asarray(rng.standard_normal((1, 100, 1000, 1), np.float32)) * solver.scale
    state = solver.init(x)

    @jax.jit
    def advance(state, x, row, noise):
        return solver.step(solver.prediction_type, state, x, _perfect_noise(x, row), row, noise)

    for row in rows(solver):
        x, state = advance(state, x, row, rng.standard_normal(x.shape, np.float32))
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(x.var()) == pytest.approx(VARIANCE, rel=0.03)


@pytest.mark.parametrize(
    ("order", "heun", "slope"),
    [(1, False, 1.0), (2, False, 2.0), (2, True, 2.0), (3, False, 2.25)],  # measured 1.00, 2.05, 1.97, 2.25
)
def test_order_of_the_multistep_weights(order, heun, slope):
    """In float64 on a uniform grid of log-SNR, with a known prediction x0 = cos(lambda) and an exact start.

    The solvers integrate d(x / sigma) / d lambda = exp(lambda) x0, here exp(lambda) (cos(lambda) + sin(lambda)) / 2.
    The formula for order 3 is not quite of third order, in diffusers and in the authors' code (see its comment).
    """
    counts, errors = (20, 40, 80, 160), []
    for count in counts:
        lambdas = np.linspace(-2.5, 3.5, count + 1)
        alpha, sigma = 1 / np.sqrt(1 + np.exp(-2 * lambdas)), 1 / np.sqrt(1 + np.exp(2 * lambdas))
        columns = multistep_columns(alpha, sigma, np.full(count, order), 3, heun)
        exact = sigma * np.exp(lambdas) * (np.cos(lambdas) + np.sin(lambdas)) / 2
        known, start = np.cos(lambdas), order - 1
        x = exact[start]
        for i in range(start, count):
            x = columns["x"][i] * x + columns["x0"][i] * known[i]
            x += columns["memory"][i] * known[i - 1] + columns["memory_2"][i] * known[i - 2]
        errors.append(abs(x - exact[-1]))
    assert _slope(errors, counts) == pytest.approx(slope, abs=0.15)


def test_pndm_beats_ddim():
    """PLMS is of a higher order than DDIM at the same number of network calls (0.0044 against 0.024 here)."""
    config = {**PUBLISHED, "prediction_type": "epsilon"}
    x = np.linspace(-2, 2, 9, dtype=np.float32).reshape(1, 3, 3, 1)
    error = {}
    for name, count in (("ddim", 101), ("pndm", 100)):
        solver = make_solver(name, config, count)
        exact = _flow(x.astype(np.float64), np.float64(solver.grid["alpha_cumprod"][0]), 0.99914998)
        error[name] = np.abs(run(solver, x, predict=_perfect_noise) - exact).max()
    assert error["pndm"] < error["ddim"] / 5


def test_inversion_and_back():
    """x_T of exact data, and the data of it: the error falls with the number of steps, as 1 / steps."""
    config, errors = {**PUBLISHED, "prediction_type": "epsilon"}, []
    x = np.linspace(-1, 1.5, 9, dtype=np.float32).reshape(1, 3, 3, 1)
    for steps in (25, 50, 100):
        inverse = ddim_inversion(config, steps)
        assert not inverse.stochastic
        noise = run(inverse, x, predict=_perfect_noise)
        errors.append(np.abs(run(make_solver("ddim", config, steps), noise, predict=_perfect_noise) - x).max())
        # The flow's own x_T.
        top = np.float64(make_solver("ddim", config, steps).grid["alpha_cumprod"][0])
        exact = _flow(x.astype(np.float64), 0.99914998, top)
    assert errors[-1] < 0.1  # measured 0.062, of 2.5
    assert _slope(errors, (25, 50, 100)) == pytest.approx(1, abs=0.3)
    np.testing.assert_allclose(noise, exact, atol=0.1)
