"""The contract of every solver: step counts, grids, what is kept between steps, and starting part-way."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sampling.trajectories import BIAS, DIFFERENT, PUBLISHED, SHAPE, config_of, network, rows, run
from unclip_jax.sampling.loop import start
from unclip_jax.sampling.solvers import (
    SCHEDULERS,
    dpmpp_2m,
    first_step,
    ldm_ddim,
    make_solver,
    pndm,
)

SPACINGS = ("leading", "linspace", "trailing")
PREDICTIONS = ("epsilon", "v_prediction")
LDM_DDIM_REFUSES = {3, 9, 27, 36, 37, *range(101, 112), *range(251, 334), *range(501, 1001)}


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


def test_stochastic_solvers_take_noise_and_no_others():
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


# --- Starting from an image, and going back ---


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
def test_strength_gives_the_first_step(name, steps, strength, options, start_step):
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


def test_a_start_from_an_image_is_its_noised_latents():
    rng = np.random.default_rng(0)
    clean, noise = rng.standard_normal((2, *SHAPE), np.float32)
    solver = make_solver("euler", PUBLISHED, 10, start_step=4)
    a = np.float64(solver.start_alpha_cumprod)
    want = np.sqrt(a) * clean + np.sqrt(1 - a) * noise
    np.testing.assert_allclose(start(solver, jnp.asarray(noise), jnp.asarray(clean)).latents, want, atol=1e-6)
