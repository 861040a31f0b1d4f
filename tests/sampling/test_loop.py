"""The loop with networks of one line: pure under every transformation, one call a row, the same step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.sampling import (
    PUBLISHED_UNCLIP_SCHEDULER,
    Branch,
    draw,
    image_keys,
    make_solver,
    run_stateful_steps,
    run_steps,
    sample,
    start,
)

SHAPE = (3, 4, 4, 4)
# One of each kind of step: with noise, with history, with two calls, of outputs as they come.
KINDS = ["ddim", "pndm", "dpm++2m", "lms-beta", "dpm2-a", "ldm-ddim", "ldm-dpm"]


def denoise(x, row):
    return jnp.tanh(0.8 * x + row["timestep"] / 1000)


def latents(seed=0):
    return jax.random.normal(jax.random.key(seed), SHAPE)


def solver_of(name, steps=6, eta=1.0):
    return make_solver(name, PUBLISHED_UNCLIP_SCHEDULER, steps, eta)


@pytest.mark.parametrize("name", KINDS)
def test_pure_under_transformations(name):
    solver, keys = solver_of(name), image_keys(7, jnp.arange(SHAPE[0]))
    run = lambda x, keys: sample(denoise, solver, x, keys=keys)  # noqa: E731
    want = run(latents(), keys)
    assert np.isfinite(want).all()
    np.testing.assert_allclose(jax.jit(run)(latents(), keys), want, rtol=1e-5, atol=1e-5)
    alone = jax.vmap(lambda x, key: run(x[None], key[None])[0])(latents(), keys)
    np.testing.assert_allclose(alone, want, rtol=1e-5, atol=1e-5)
    one = run(latents()[1:2], keys[1:2])
    np.testing.assert_allclose(one, want[1:2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_gradients_agree_with_finite_differences(name):
    solver, keys = solver_of(name), image_keys(7, jnp.arange(SHAPE[0]))
    run = jax.jit(lambda x: sample(jax.checkpoint(denoise), solver, x, keys=keys).sum())
    direction, step = latents(1), 1e-2
    difference = (run(latents() + step * direction) - run(latents() - step * direction)) / (2 * step)
    gradient = jnp.vdot(jax.grad(run)(latents()), direction)
    np.testing.assert_allclose(gradient, difference, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("name", KINDS)
def test_steps_one_by_one_are_the_same_run(name):
    solver, keys = solver_of(name), image_keys(7, jnp.arange(SHAPE[0]))
    carry = start(solver, latents())
    for call in range(solver.calls):
        rows = {key: jnp.asarray(column[call : call + 1]) for key, column in solver.grid.items()}
        carry = run_steps(denoise, solver, carry, rows, keys)
    np.testing.assert_allclose(carry.latents, sample(denoise, solver, latents(), keys=keys), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ddim", "ldm-ddim"])
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_noise_by_keys_is_the_noise_of_each_image_and_call(name, eta):
    """What keys draw inside the loop, drawn outside and given: the same end. And it matters."""
    solver, keys = solver_of(name, eta=eta), image_keys(7, jnp.arange(SHAPE[0]))
    noise = jnp.stack([draw(keys, Branch.STEP, SHAPE[1:], call) for call in range(solver.calls)])
    by_keys = sample(denoise, solver, latents(), keys=keys)
    np.testing.assert_allclose(by_keys, sample(denoise, solver, latents(), step_noise=noise), rtol=1e-6, atol=1e-6)
    other = sample(denoise, solver, latents(), keys=image_keys(8, jnp.arange(SHAPE[0])))
    assert np.abs(np.asarray(by_keys - other)).mean() > 0.1 * eta


@pytest.mark.parametrize("name", ["ddim", "dpm++2m"])
def test_spans_are_the_same_run_by_one_program(name):
    solver, keys, traces = solver_of(name), image_keys(7, jnp.arange(SHAPE[0])), []
    rows = {column: jnp.asarray(values) for column, values in solver.grid.items()}

    @jax.jit
    def run(carry, first, end):
        traces.append(1)

        def stateful(x, row, state):
            return denoise(x, row), state + 1

        return run_stateful_steps(stateful, solver, carry, rows, keys, span=(first, end))

    carry = start(solver, latents(), guidance_state=jnp.int32(0))
    for first, end in ((0, 2), (2, 3), (3, 3), (3, 6)):
        carry = run(carry, np.int32(first), np.int32(end))
        assert carry.guidance_state == end
    assert len(traces) == 1
    np.testing.assert_allclose(carry.latents, sample(denoise, solver, latents(), keys=keys), rtol=1e-5, atol=1e-5)


def test_stochastic_step_by_hand():
    """One DDIM step from t to t - 500 with eta 1, from its formula (arXiv:2010.02502, eq. 12 and 16)."""
    solver = solver_of("ddim", steps=2, eta=1.0)
    noise = jax.random.normal(jax.random.key(3), (2, *SHAPE))
    carry = start(solver, latents())
    row = {key: jnp.asarray(column[:1]) for key, column in solver.grid.items()} | {"step_noise": noise[:1]}
    got = run_steps(denoise, solver, carry, row).latents
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    table = np.cumprod(1 - betas)
    here, there = table[501], table[1]
    x, v = np.asarray(latents(), np.float64), np.asarray(denoise(latents(), {"timestep": 501.0}), np.float64)
    x0, eps = np.sqrt(here) * x - np.sqrt(1 - here) * v, np.sqrt(here) * v + np.sqrt(1 - here) * x
    sigma = np.sqrt((1 - there) / (1 - here) * (1 - here / there))
    want = np.sqrt(there) * x0 + np.sqrt(1 - there - sigma**2) * eps + sigma * np.asarray(noise[0])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_one_network_call_a_row():
    calls = []

    def counting(x, row):
        jax.debug.callback(lambda index: calls.append(int(index)), row["index"])
        return denoise(x, row)

    solver = solver_of("pndm")
    jax.block_until_ready(sample(counting, solver, latents()))
    jax.effects_barrier()
    assert sorted(calls) == list(range(solver.calls))


def test_a_stochastic_solver_asks_for_noise():
    with pytest.raises(ValueError, match="stochastic"):
        sample(denoise, solver_of("ddim"), latents())
