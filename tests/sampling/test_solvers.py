"""Solvers against recorded trajectories, exact solutions and their own contracts."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sampling.trajectories import BIAS, DIFFERENT, PUBLISHED, SHAPE, network, rows, run
from unclip_jax.sampling.loop import start
from unclip_jax.sampling.solvers import (
    PUBLISHED_UNCLIP_SCHEDULER,
    SCHEDULERS,
    ddim_inversion,
    describes,
    dpmpp_2m,
    first_step,
    ldm_ddim,
    ldm_dpm,
    make_solver,
    pndm,
    scheduler_name,
)
from unclip_jax.sampling.solvers.dpmpp import multistep_columns
from unclip_jax.sampling.solvers.ldm import continuous_grid
from unclip_jax.sampling.solvers.settings import SCHEDULE_DEFAULTS, noise_schedule, read_settings

pytestmark = pytest.mark.usefixtures("fully_compiled")

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = np.load(FOLDER / "schedules.npz")
REPLAYS = json.loads((FOLDER / "schedules.json").read_text())["replays"]
SPACINGS = ("leading", "linspace", "trailing")
PREDICTIONS = ("epsilon", "v_prediction")
LDM_DDIM_REFUSES = {3, 9, 27, 36, 37, *range(101, 112), *range(251, 334), *range(501, 1001)}


def config_of(name):
    """The published configuration, of noise for the solver that takes no v."""
    return {**PUBLISHED, "prediction_type": "epsilon"} if name == "ldm-plms" else PUBLISHED


# --- Equal to the references ---


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


# --- Right: orders of convergence on Gaussian data, where the probability flow has an exact solution ---

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
    x, state = jnp.asarray(rng.standard_normal((1, 100, 1000, 1), np.float32)) * solver.scale, None
    state = solver.init(x)
    step = jax.jit(solver.step, static_argnums=0)
    for row in rows(solver):
        noise = rng.standard_normal(x.shape, np.float32)
        x, state = step(solver.prediction_type, state, x, _perfect_noise(x, row), row, noise)
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


# --- Structure ---


@pytest.mark.parametrize("name", DIFFERENT)
@given(data=st.data())
@settings(deadline=None, max_examples=25)
def test_every_count_works_or_is_refused(name, data):
    config = {**PUBLISHED, "timestep_spacing": data.draw(st.sampled_from(SPACINGS))}
    config["prediction_type"] = "epsilon" if name == "ldm-plms" else data.draw(st.sampled_from(PREDICTIONS))
    config["skip_prk_steps"] = data.draw(st.booleans())
    config["final_sigmas_type"] = data.draw(st.sampled_from(["zero", "sigma_min"]))
    config["solver_order"] = data.draw(st.sampled_from([1, 2, 3]))
    config["solver_type"] = data.draw(st.sampled_from(["midpoint", "heun"]))
    config["rescale_betas_zero_snr"] = not name.startswith("ldm") and config["prediction_type"] == "v_prediction"
    config["predict_x0"] = config["final_sigmas_type"] == "zero" or data.draw(st.booleans())
    config["original_inference_steps"] = 1000
    steps = data.draw(st.integers(1, 1000) | st.sampled_from([1, 2, 3, 4, 61, 998, 999, 1000]))
    eta, refusal = data.draw(st.floats(0, 1)), None
    try:
        solver = make_solver(name, config, steps, eta)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert refusal.startswith("num_inference_steps")
        assert "\n" not in refusal
        return
    grid = solver.grid
    calls = len(grid["index"])
    assert solver.calls == calls >= steps
    assert all(column.shape == (calls,) and np.isfinite(column[column != np.inf]).all() for column in grid.values())
    assert {column.dtype for key, column in grid.items() if key != "index"} == {np.dtype("float32")}
    np.testing.assert_array_equal(grid["index"], np.arange(calls))
    assert grid["index"].dtype == np.int32
    assert grid["timestep"].min() >= 0
    assert grid["timestep"].max() < 1000
    if name != "pndm":  # which goes back for its first steps; dpm2 rounds some timesteps and not those between
        assert (np.diff(grid["timestep"]) <= (1 if name.startswith("dpm2") else 0)).all()
    assert (grid["alpha_cumprod"] >= 0).all()
    assert (grid["alpha_cumprod"] < 1).all()


def test_ldm_ddim_refuses_exactly_the_counts_that_break_the_original():
    refused = set()
    for steps in range(1, 1001):
        try:
            ldm_ddim(PUBLISHED, steps)
        except ValueError:
            refused.add(steps)
    assert refused == LDM_DDIM_REFUSES


@pytest.mark.parametrize(("steps", "nearest"), [(3, "2, 4"), (36, "35, 38"), (300, "250, 334"), (1000, "500")])
def test_ldm_ddim_names_the_nearest_counts(steps, nearest):
    with pytest.raises(ValueError, match=f"num_inference_steps={steps} .*nearest accepted: {nearest}$"):
        ldm_ddim(PUBLISHED, steps)


@pytest.mark.parametrize(
    ("name", "steps", "calls"),
    [
        ("ddim", 7, 7),
        ("pndm", 1, 1),
        ("pndm", 2, 3),
        ("pndm", 20, 21),
        ("dpm++2m", 1, 1),
        ("dpm++2m", 20, 20),
        ("dpm++2m-karras", 20, 20),
        ("ldm-ddim", 1, 1),
        ("ldm-ddim", 30, 31),
        ("ldm-ddim", 75, 77),
        ("ldm-dpm", 2, 2),
    ],
)
def test_number_of_network_calls(name, steps, calls):
    assert make_solver(name, PUBLISHED, steps).calls == calls


def test_runge_kutta_start_takes_four_calls_a_step():
    solver = pndm({**PUBLISHED, "skip_prk_steps": False}, 10)
    assert solver.calls == 19
    np.testing.assert_array_equal(solver.grid["timestep"][:13:4], [901, 801, 701, 601])


def test_the_last_step_of_dpm_returns_its_prediction():
    grid = dpmpp_2m({**PUBLISHED, "solver_order": 3}, 20).grid
    assert [float(grid[key][-1]) for key in ("x", "x0", "memory", "memory_2")] == [0, 1, 0, 0]


def test_steps_at_one_noise_level_count_as_one():
    """1000 steps of linspace visit timestep 500 twice; diffusers gives NaN there."""
    grid = dpmpp_2m(PUBLISHED, 1000).grid
    assert np.count_nonzero(np.diff(grid["timestep"]) == 0) == 1
    twice = int(np.argmin(np.abs(np.diff(grid["timestep"]))))
    assert [float(grid[key][twice]) for key in ("x", "x0", "memory")] == [1, 0, 0]
    assert np.isfinite(run(dpmpp_2m(PUBLISHED, 1000), np.ones(SHAPE, np.float32))).all()


@pytest.mark.parametrize("name", DIFFERENT)
def test_solvers_are_pytrees_that_scan_without_recompiling(name):
    """The compiled loop takes the grid as an argument: another eta or threshold is not another program."""
    traces = 0

    @jax.jit
    def sample(solver, x):
        nonlocal traces
        traces += 1

        def body(carry, row):
            x, state = carry
            noise = jnp.ones_like(x) if solver.stochastic else None
            out = jnp.tanh(0.8 * x + BIAS * row["timestep"] / 1000).astype(jnp.bfloat16)
            return solver.step(solver.prediction_type, state, x, out, row, noise), None

        return jax.lax.scan(body, (x, solver.init(x)), solver.grid)[0][0]

    x = jnp.ones(SHAPE)
    ends = [sample(make_solver(name, config_of(name), 6, eta), x) for eta in (0.0, 1.0)]
    assert traces == 1
    assert ends[0].dtype == jnp.float32
    assert bool((ends[0] == ends[1]).all()) != (name in ("ddim", "tcd", "ldm-ddim"))


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


def test_who_takes_noise():
    stochastic = {name for name in SCHEDULERS if make_solver(name, config_of(name), 4).stochastic}
    drawing = ("ddim", "ddpm", "ldm-ddim", "dpm++2m-sde", "euler-a", "dpm2-a", "lcm", "tcd")
    assert stochastic == {name for name in SCHEDULERS if name.startswith(drawing)}
    solver, x = make_solver("ddim", PUBLISHED, 4), jnp.ones(SHAPE)
    with pytest.raises(ValueError, match="noise is None"):
        solver.step("epsilon", (), x, x, rows(solver)[0], None)


def test_images_of_a_batch_do_not_mix_under_thresholding():
    config = {**PUBLISHED, "thresholding": True, "sample_max_value": 3.0, "dynamic_thresholding_ratio": 0.8}
    x = np.stack([np.full(SHAPE[1:], 0.1), np.linspace(-9, 9, np.prod(SHAPE[1:])).reshape(SHAPE[1:])])
    x = x.astype(np.float32)
    for name in ("ddim", "dpm++2m"):
        solver = make_solver(name, config, 3, own=True)

        def predict(x, row):
            return network(x, row["timestep"], jnp, 0.0)

        alone = [run(solver, x[i : i + 1], predict=predict)[0] for i in range(2)]
        np.testing.assert_array_equal(run(solver, x, predict=predict), np.stack(alone))


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        *(("ddim", 0), ("ddpm", 0), ("euler", 0), ("euler-a", 0), ("lcm", 0), ("tcd", 0), ("ldm-ddim", 0)),
        *(("heun", 1), ("dpm2", 1), ("dpm2-a", 1), ("dpm++2m", 1), ("dpm++2m-sde", 1), ("dpm++2s", 1), ("deis", 1)),
        *(("ldm-dpm", 1), ("unipc", 2), ("lms", 3), ("ldm-plms", 3), ("pndm", 5)),
    ],
)
def test_what_is_remembered_is_what_is_documented(name, kept):
    assert len(make_solver(name, config_of(name), 20).init(jnp.zeros(SHAPE))) == kept
    page = (Path(__file__).parents[2] / "docs" / "solvers.md").read_text(encoding="utf-8")
    cells = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |")).split("|")
    assert (int(cells[5]), int(cells[6])) == (make_solver(name, config_of(name), 20).calls, kept)


# --- Starting from a picture, and going back ---


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_is_left_of_a_run_is_the_runs_end(name):
    """Same timesteps, noise levels falling from the start's; step counts and indices as for a run of its own."""
    whole = make_solver(name, config_of(name), 10)
    if name in ("ldm-dpm", "ldm-plms"):
        with pytest.raises(ValueError, match=f"start_step is 4; '{name}' has no start part-way"):
            make_solver(name, config_of(name), 10, start_step=4)
        return
    part = make_solver(name, config_of(name), 10, start_step=4)
    np.testing.assert_array_equal(part.grid["timestep"], whole.grid["timestep"][whole.calls - part.calls :])
    np.testing.assert_array_equal(part.grid["index"], np.arange(part.calls))
    above = whole.grid["alpha_cumprod"][whole.calls - part.calls - (name == "ldm-ddim")]
    assert part.start_alpha_cumprod == above
    if name != "ldm-ddim":
        assert part.calls == whole.calls - 4 * (2 if name.startswith(("heun", "dpm2")) else 1)
        assert whole.start_alpha_cumprod == whole.grid["alpha_cumprod"][0]
    for start_step in (-1, 10, 1.0, True):
        with pytest.raises(ValueError, match="start_step is"):
            make_solver(name, config_of(name), 10, start_step=start_step)


@pytest.mark.parametrize("name", ["dpm++2m", "dpm++2m-sde", "dpm++2s", "unipc", "deis"])
def test_history_begins_where_the_run_begins(name):
    """Whatever was remembered before the first step that is left has no weight."""
    grid = make_solver(name, {**PUBLISHED, "solver_order": 3}, 20, start_step=5).grid
    assert grid["memory"][0] == grid["memory_2"][0] == grid["memory_2"][1] == 0
    if name == "unipc":
        assert grid["memory_3"][:2].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("name", "steps", "strength", "options", "start_step"),
    [
        ("pndm", 50, 0.8, {}, 10),
        ("euler", 20, 1.0, {}, 0),
        ("euler", 20, 0.99, {}, 1),
        ("heun-karras", 3, 0.34, {}, 2),
        ("ldm-ddim", 50, 0.8, {}, 10),
        ("ldm-ddim", 20, 0.05, {}, 19),
        ("ldm-ddim", 30, 1.0, {}, 1),  # whose grid has 31 steps
        ("ldm-ddim", 50, 1.0, {"depth": True}, 1),
        ("ldm-ddim", 50, 0.5, {"depth": True}, 25),
        ("ddim", 50, 1.0, {"depth": True}, 0),
    ],
)
def test_first_step(name, steps, strength, options, start_step):
    assert first_step(name, steps, strength, **options) == start_step
    assert make_solver(name, PUBLISHED, steps, start_step=start_step).calls >= int(steps * strength) - 1


@pytest.mark.parametrize(
    ("name", "steps", "strength", "message"),
    [
        ("ddim", 20, 0.0, "strength is 0.0; want a number above 0, to 1"),
        ("ddim", 20, 1.1, "strength is 1.1"),
        ("ddim", 20, float("nan"), "strength is nan"),
        ("ddim", 20, None, "strength is None"),
        ("ddim", 20, 0.04, "strength is 0.04 and num_inference_steps 20, which leaves no step"),
        ("ddim", 0, 0.5, "num_inference_steps is 0"),
        ("ldm-ddim", 20, 1.0, "strength is 1.0; 'ldm-ddim' with 20 steps .* want less than 1, 0.95 for one step less"),
        ("ldm-dpm", 20, 0.5, "'ldm-dpm' cannot start from an image"),
        ("ldm-plms", 20, 0.5, "'ldm-plms' cannot start from an image"),
        ("eulr", 20, 0.5, "unknown scheduler 'eulr'; did you mean 'euler'"),
    ],
)
def test_bad_strengths_are_refused(name, steps, strength, message):
    with pytest.raises(ValueError, match=message) as error:
        first_step(name, steps, strength)
    assert "\n" not in str(error.value)


def test_a_start_from_a_image_is_its_noised_latents():
    rng = np.random.default_rng(0)
    clean, noise = rng.standard_normal((2, *SHAPE), np.float32)
    solver = make_solver("euler", PUBLISHED, 10, start_step=4)
    a = np.float64(solver.start_alpha_cumprod)
    want = np.sqrt(a) * clean + np.sqrt(1 - a) * noise
    np.testing.assert_allclose(start(solver, jnp.asarray(noise), jnp.asarray(clean)).latents, want, atol=1e-6)


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


# --- Names and settings ---


def test_the_published_configuration_names_pndm():
    assert scheduler_name(PUBLISHED_UNCLIP_SCHEDULER) == "pndm"
    assert scheduler_name({"_class_name": "DDIMScheduler"}) == "ddim"
    assert scheduler_name({"_class_name": "DPMSolverMultistepScheduler"}) == "dpm++2m"
    karras = {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}
    assert scheduler_name(karras) == "dpm++2m-karras"
    assert scheduler_name({"_class_name": "HeunDiscreteScheduler", "use_beta_sigmas": True}) == "heun-beta"
    sde = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}
    assert scheduler_name(sde) == "dpm++2m-sde"
    assert scheduler_name({**sde, "use_lu_lambdas": True}) == "dpm++2m-sde-lu"
    assert scheduler_name({"_class_name": "UniPCMultistepScheduler", "use_exponential_sigmas": True}) == (
        "unipc-exponential"
    )
    # Keys that the class does not have are another's.
    assert scheduler_name({"_class_name": "EulerAncestralDiscreteScheduler", "use_karras_sigmas": True}) == "euler-a"
    for kind in ("RePaintScheduler", None):
        with pytest.raises(ValueError, match=f"{kind}.*accepted: DDIMScheduler, DDPMScheduler, PNDMScheduler"):
            scheduler_name({"_class_name": kind})


@pytest.mark.parametrize(
    ("name", "meant"), [("ddiim", "ddim"), ("DDIM", "ddim"), ("dpm++2m_karras", "dpm++2m-karras"), ("plms-ldm", "lms")]
)
def test_unknown_names_suggest_the_nearest(name, meant):
    with pytest.raises(ValueError, match=r"unknown scheduler .*accepted: ddim, ddpm, pndm, dpm\+\+2m") as error:
        make_solver(name, PUBLISHED, 5)
    assert meant is None or f"did you mean {meant!r}?" in str(error.value)


@pytest.mark.parametrize("name", DIFFERENT)
@pytest.mark.parametrize("steps", [0, -1, 1001, 2.0, "20", True, None, float("nan")])
def test_bad_step_counts_are_refused(name, steps):
    with pytest.raises(ValueError, match=r"^num_inference_steps is "):
        make_solver(name, config_of(name), steps)


@pytest.mark.parametrize("name", ["ddim", "heun", "ldm-dpm"])
@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan"), float("inf"), "1", None, True])
def test_bad_eta_is_refused(name, eta):
    with pytest.raises(ValueError, match=r"^eta is "):
        make_solver(name, PUBLISHED, 5, eta)


def test_numpy_numbers_are_numbers():
    assert make_solver("ddim", PUBLISHED, np.int64(5), np.float32(0.5)).calls == 5


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("ddim", {"timestep_spacing": "random"}, "timestep_spacing is 'random'; accepted: 'leading'"),
        ("ddim", {"steps_offset": 1.5}, "steps_offset"),
        ("ddim", {"steps_offset": 10**30}, "steps_offset"),
        ("ddim", {"steps_offset": 900}, "steps_offset 900 needs timestep 1"),
        ("ddim", {"clip_sample": "yes"}, "clip_sample"),
        ("ddim", {"clip_sample_range": -1.0}, "clip_sample_range"),
        ("ddim", {"clip_sample_range": float("nan")}, "clip_sample_range"),
        ("ddim", {"thresholding": True, "dynamic_thresholding_ratio": 2.0}, "dynamic_thresholding_ratio"),
        ("ddim", {"thresholding": True, "sample_max_value": 0.0}, "sample_max_value"),
        ("ddim", {"beta_start": "small"}, "beta_start"),
        ("ddim", {"beta_start": 10**400}, "beta_start"),
        ("ddim", {"num_train_timesteps": 10**12}, "num_train_timesteps"),
        ("ddim", {"trained_betas": [0.1, 0.2]}, "trained_betas has 2 values"),
        ("ddim", {"trained_betas": "betas"}, "trained_betas"),
        ("ddim", {"prediction_type": "flow_prediction"}, "prediction_type"),
        ("ddim", {"prediction_type": ["epsilon"]}, "prediction_type"),
        (
            "ddim",
            {"prediction_type": "epsilon", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            "zero signal",
        ),
        ("pndm", {"prediction_type": "sample"}, "prediction_type is 'sample'"),
        ("dpm++2m", {"algorithm_type": "unipc"}, "algorithm_type is 'unipc'"),
        ("dpm++2m", {"algorithm_type": "dpmsolver"}, "which wants final_sigmas_type 'sigma_min', not 'zero'"),
        ("dpm++2s", {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type is 'sde-dpmsolver"),
        ("unipc", {"solver_p": "DDIMScheduler"}, "solver_p is 'DDIMScheduler'"),
        ("unipc", {"disable_corrector": 3}, "disable_corrector is 3; want a list of integers"),
        ("unipc", {"predict_x0": False}, "final_sigmas_type is 'zero'; want 'sigma_min' with predict_x0 false"),
        ("deis", {"thresholding": True}, "thresholding is True"),
        ("lcm", {"original_inference_steps": 0}, "original_inference_steps is 0; want 1 to 1000"),
        ("lcm", {"original_inference_steps": 15}, "num_inference_steps is 20; want 1 to 15 for 'lcm', whose"),
        ("ldm-plms", {"prediction_type": "v_prediction"}, "'ldm-plms' works with models that predict epsilon only"),
        ("dpm++2m", {"solver_order": 4}, "solver_order is 4; accepted: 1, 2, 3"),
        ("dpm++2m", {"solver_type": "euler"}, "solver_type"),
        ("dpm++2m", {"final_sigmas_type": "one"}, "final_sigmas_type"),
        ("dpm++2m", {"use_flow_sigmas": True}, "use_flow_sigmas is True"),
        ("dpm++2m", {"variance_type": "learned"}, "variance_type is 'learned'"),
        ("ldm-ddim", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True"),
        ("ldm-dpm", {"prediction_type": "sample"}, "prediction_type is 'sample'"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused_by_name(name, setting, message):
    with pytest.raises(ValueError, match=message) as error:
        make_solver(name, {**PUBLISHED, **setting}, 20, own=True)
    assert "\n" not in str(error.value)


def test_keys_of_other_classes_are_ignored():
    foreign = {"_diffusers_version": "0.1", "thresholding": "?", "clip_sample": "?", "solver_order": 9, "mine": [1]}
    for name in ("pndm", "ldm-ddim", "ldm-dpm"):
        make_solver(name, {**PUBLISHED, **foreign}, 5)


def test_absent_keys_take_the_new_classes_default():
    """The published PNDM file has no timestep_spacing: leading for DDIM, linspace for DPM-Solver++."""
    assert make_solver("ddim", PUBLISHED, 5).grid["timestep"].tolist() == [801, 601, 401, 201, 1]
    assert make_solver("dpm++2m", PUBLISHED, 5).grid["timestep"].tolist() == [999, 799, 599, 400, 200]
    leading = {**PUBLISHED, "timestep_spacing": "leading"}
    assert make_solver("dpm++2m", leading, 5).grid["timestep"].tolist() == [831, 665, 499, 333, 167]
    # DDIM's own defaults: clipping on, no offset, alphas_cumprod 1 at the end.
    grid = make_solver("ddim", {}, 5, own=True).grid
    assert (grid["timestep"][-1], grid["clip"][0], grid["x0"][-1]) == (0, 1, 1)


@pytest.mark.parametrize("setting", [{"clip_sample": True}, {"clip_sample": ...}, {"thresholding": True}])
@pytest.mark.parametrize("name", [name for name in SCHEDULERS if not name.startswith("ldm-")])
def test_a_solver_that_takes_anothers_place_never_limits_x0(name, setting):
    """Latents go far beyond what these settings, and some classes' defaults, would leave of them."""
    config = {key: value for key, value in {**PUBLISHED, **setting}.items() if value is not ...}
    grid = make_solver(name, config, 5).grid
    assert np.all(np.isinf(grid.get("clip", np.inf)))
    assert "threshold_ratio" not in grid


def test_defaults_of_the_class_whose_place_is_taken_do_not_count():
    """As in diffusers, which marks them."""
    config = {**PUBLISHED, "steps_offset": 1, "_use_default_values": ["steps_offset"]}
    assert make_solver("ddim", config, 5).grid["timestep"][-1] == 0
    assert make_solver("ddim", config, 5, own=True).grid["timestep"][-1] == 1
    assert make_solver("ddim", {**PUBLISHED, "_use_default_values": 5}, 5).grid["timestep"][-1] == 1


def test_what_a_file_describes():
    assert describes(PUBLISHED_UNCLIP_SCHEDULER, "pndm")
    assert not describes(PUBLISHED_UNCLIP_SCHEDULER, "ddim")
    assert describes({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, "euler-karras")
    assert not describes({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, "euler")
    for config in ({}, {"_class_name": "RePaintScheduler"}, {"_class_name": ["DDIMScheduler"]}):
        assert not describes(config, "ddim")


@pytest.mark.parametrize("steps", [61, 998])
def test_trailing_spacing_ends_before_timestep_zero(steps):
    """Where diffusers' rounding adds a timestep of -1."""
    for name, calls in (("ddim", steps), ("pndm", steps + 1), ("dpm++2m", steps)):
        grid = make_solver(name, {**PUBLISHED, "timestep_spacing": "trailing"}, steps).grid
        assert len(grid["index"]) == calls
        assert grid["timestep"].min() >= 0
