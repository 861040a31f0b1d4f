"""A step of training: the same on one device and on four, by image alone, and unmoved by what is not a number."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unclip_jax.distributed import mesh as placement
from unclip_jax.training.optimizer import adamw
from unclip_jax.training.rng import draw_step, step_keys
from unclip_jax.training.step import start_training, train_step

SHAPE = (4, 4, 2)


def losses(params, batch, step):
    """A denoiser of one matrix."""
    d = draw_step(step_keys(7, step, batch["index"]), SHAPE, 3)
    x = batch["x"] + d.noise * (d.timesteps[:, None, None, None] / 1000)
    each = jnp.square(x @ params["w"] + params["b"] - d.noise).mean((1, 2, 3))
    return each, {"kept": d.keep_image.mean()}


def batch(number, size=8):
    x = np.random.default_rng(number).standard_normal((size, *SHAPE)).astype(np.float32)
    return {"x": x, "index": np.arange(size, dtype=np.int32)}


def begin(optimizer):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.standard_normal((2, 2)), jnp.float32), "b": jnp.zeros(2)}
    return start_training(params, optimizer)


def run(mesh, steps=5):
    optimizer = adamw(0.01, max_grad_norm=1.0)
    step = jax.jit(functools.partial(train_step, losses, optimizer, ema_decay=0.9), donate_argnums=0)
    state = jax.device_put(begin(optimizer), placement.replicated(mesh))
    seen = []
    for number in range(steps):
        state, report = step(state, jax.device_put(batch(number), placement.batch_sharding(mesh)))
        seen.append(float(report["loss"]))
    return state, seen


def test_four_devices_are_one():
    one, alone = run(placement.local_mesh(jax.local_devices()[:1]))
    four, together = run(placement.local_mesh(jax.local_devices()[:4]))
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    for got, want in zip(jax.tree.leaves(four), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    assert int(one.step) == 5
    assert len(set(alone)) == 5


def test_a_run_that_stops_and_goes_on_is_the_same():
    """From a copy of the state alone, bit for bit."""
    mesh = placement.local_mesh(jax.local_devices()[:1])
    optimizer = adamw(0.01)
    step = jax.jit(functools.partial(train_step, losses, optimizer))
    state = begin(optimizer)
    for number in range(3):
        state, _ = step(state, batch(number))
    state = jax.device_put(jax.tree.map(np.asarray, state), placement.replicated(mesh))
    for number in range(3, 6):
        state, _ = step(state, batch(number))
    whole = begin(optimizer)
    for number in range(6):
        whole, _ = step(whole, batch(number))
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_no_number_moves_nothing(value):
    optimizer = adamw(0.01)
    step = jax.jit(functools.partial(train_step, losses, optimizer))
    good, _ = step(begin(optimizer), batch(0))
    bad = batch(1)
    bad["x"][3, 0, 0, 0] = value
    after, report = step(good, bad)
    assert not np.isfinite(report["loss"])
    for got, want in zip(jax.tree.leaves(after), jax.tree.leaves(good), strict=True):
        np.testing.assert_array_equal(got, want)


def test_the_loss_falls_and_the_average_follows():
    optimizer = optax.sgd(0.1)
    step = jax.jit(functools.partial(train_step, losses, optimizer, ema_decay=0.5))
    state = begin(optimizer)
    _, first = step(state, batch(0))
    for number in range(60):
        state, report = step(state, batch(number))
    assert report["loss"] < 0.7 * first["loss"]
    np.testing.assert_allclose(state.average.params["w"], state.params["w"], atol=0.05)
    assert start_training(state.params, optimizer, average=False).average is None


def test_draws_are_an_images_own():
    keys = step_keys(1, 5, jnp.arange(6))
    whole = draw_step(keys, SHAPE, 3)
    part = draw_step(step_keys(1, 5, jnp.array([4, 1])), SHAPE, 3)
    for got, want in zip(part, whole, strict=True):
        np.testing.assert_array_equal(got, want[jnp.array([4, 1])])
    for other in (step_keys(1, 6, jnp.arange(6)), step_keys(2, 5, jnp.arange(6))):
        assert not np.array_equal(draw_step(other, SHAPE, 3).noise, whole.noise)


def test_draws_have_their_distributions():
    d = draw_step(step_keys(0, 0, jnp.arange(20_000)), (1, 1, 1), 1, text_dropout=0.1)
    for uniform in (d.timesteps, d.levels):
        assert (uniform.min(), uniform.max()) == (0, 999)
        np.testing.assert_allclose(uniform.mean(), 499.5, atol=8)  # four standard errors
    for normal in (d.noise, d.posterior_noise, d.offset, d.embedding_noise):
        np.testing.assert_allclose([normal.mean(), normal.std()], [0, 1], atol=0.03)
    np.testing.assert_allclose([d.keep_image.mean(), d.keep_text.mean()], [0.75, 0.9], atol=0.0125)
    both = d.keep_text.astype(int) + 2 * d.keep_original
    np.testing.assert_allclose(np.bincount(both) / len(both), [0.05, 0.05, 0.05, 0.85], atol=0.0125)
    different = [np.asarray(a).ravel() for a in (d.noise, d.posterior_noise, d.offset, d.embedding_noise)]
    assert np.abs(np.corrcoef(different) - np.eye(4)).max() < 0.03


@pytest.mark.parametrize("name", ["embedding_dropout", "text_dropout"])
def test_shares_are_shares(name):
    with pytest.raises(ValueError, match=f"{name} is 1.5"):
        draw_step(step_keys(0, 0, jnp.arange(1)), SHAPE, **{name: 1.5})
