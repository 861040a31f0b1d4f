"""Noise schedules against recorded tables and closed forms; conversions between prediction types."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unclip_jax.sampling.schedule import PREDICTION_TYPES, NoiseSchedule, add_noise, alphas_cumprod, to_x0_eps

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "schedules.npz")
SD = NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
X4 = NoiseSchedule(beta_start=1e-4, beta_end=2e-2, beta_schedule="scaled_linear")
COSINE = NoiseSchedule(beta_schedule="squaredcos_cap_v2")


@pytest.mark.parametrize(
    ("reference", "name", "schedule"),
    [
        ("original", "sd", SD),
        ("original", "x4", X4),
        ("original", "aug", COSINE),
        ("diffusers", "sd", SD),
        ("diffusers", "linear", NoiseSchedule()),
        ("diffusers", "aug", COSINE),
    ],
)
def test_tables_are_bit_equal_to_the_references(reference, name, schedule):
    table = alphas_cumprod(schedule, reference)
    assert table.dtype == np.float32
    np.testing.assert_array_equal(table, GOLDEN[f"{reference}_{name}_alphas_cumprod"])


def test_the_references_differ_where_they_are_known_to():
    """Guards the two tables against being quietly made one."""
    for schedule, largest in ((SD, 2e-6), (COSINE, 2e-5)):
        ours, theirs = alphas_cumprod(schedule, "original"), alphas_cumprod(schedule, "diffusers")
        assert 0 < np.abs(theirs / ours - 1).max() < largest


@pytest.mark.parametrize("reference", ["original", "diffusers"])
@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_zero_terminal_snr_keeps_the_first_value_and_ends_in_zero(reference, kind):
    plain = alphas_cumprod(NoiseSchedule(beta_schedule=kind), reference)
    rescaled = alphas_cumprod(NoiseSchedule(beta_schedule=kind, rescale_betas_zero_snr=True), reference)
    assert rescaled[-1] == 0
    assert (np.diff(rescaled) < 0).all()
    np.testing.assert_allclose(rescaled[0], plain[0], rtol=1e-6)


@given(st.lists(st.floats(1e-4, 0.1), min_size=2, max_size=50))
@settings(deadline=None)
def test_trained_betas_replace_the_schedule(betas):
    schedule = NoiseSchedule(num_train_timesteps=len(betas), trained_betas=tuple(betas))
    expected = np.cumprod(1 - np.array(betas))
    np.testing.assert_allclose(alphas_cumprod(schedule, "original"), expected, rtol=1e-6)
    np.testing.assert_allclose(alphas_cumprod(schedule, "diffusers"), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_train_timesteps": 1}, "num_train_timesteps"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'"),
        ({"beta_start": 0.0}, "beta_start"),
        ({"beta_start": 0.03}, "beta_start"),
        ({"beta_end": float("nan")}, "beta_end"),
        ({"trained_betas": (0.1,) * 3}, "trained_betas has 3 values"),
        ({"num_train_timesteps": 3, "trained_betas": (0.1, 1.0, 0.1)}, "trained_betas"),
        ({"num_train_timesteps": 2, "trained_betas": (0.1, float("nan"))}, "trained_betas"),
    ],
)
def test_bad_schedules_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        NoiseSchedule(**fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("reference", ["original", "diffusers"])
@pytest.mark.parametrize("fields", [{"beta_start": 1e-12, "beta_end": 1e-3}, {"beta_start": 0.9, "beta_end": 0.99}])
def test_betas_beyond_float32_are_refused(fields, reference):
    with pytest.raises(ValueError, match="too small or too large"):
        alphas_cumprod(NoiseSchedule(**fields), reference)


def _output(kind, x0, eps, a):
    """What a perfect network of each kind says."""
    v = np.sqrt(a) * eps - np.sqrt(1 - a) * x0
    return {"epsilon": eps, "v_prediction": v, "sample": x0}[kind]


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@given(st.floats(0.01, 0.99), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=25)
def test_every_prediction_gives_back_data_and_noise(kind, a, seed):
    rng = np.random.default_rng(seed)
    x0, eps = rng.standard_normal((2, 2, 3, 3, 4)).astype(np.float32)
    x = add_noise(jnp.asarray(x0), jnp.asarray(eps), np.float32(a))
    got_x0, got_eps = to_x0_eps(kind, jnp.asarray(_output(kind, x0, eps, a), jnp.float32), x, np.float32(a))
    np.testing.assert_allclose(got_x0, x0, atol=2e-5)
    np.testing.assert_allclose(got_eps, eps, atol=2e-5)


def test_each_image_may_have_its_own_noise_level():
    x0, noise = jnp.ones((2, 3, 3, 4)), jnp.full((2, 3, 3, 4), 2.0)
    mixed = add_noise(x0, noise, np.array([0.25, 1.0], np.float32))
    np.testing.assert_allclose(mixed[0], 0.5 + 2 * np.sqrt(0.75), rtol=1e-6)
    np.testing.assert_allclose(mixed[1], 1.0)
    embeddings = add_noise(x0[:, 0, 0], noise[:, 0, 0], np.array([0.25, 1.0], np.float32))
    np.testing.assert_array_equal(embeddings, mixed[:, 0, 0])
    one_by_one = [to_x0_eps("v_prediction", x0[i], mixed[i], a)[0] for i, a in enumerate((0.25, 1.0))]
    both, _ = to_x0_eps("v_prediction", x0, mixed, np.array([0.25, 1.0], np.float32))
    np.testing.assert_array_equal(both, np.stack(one_by_one))


def test_low_precision_is_cast_up():
    half = jnp.ones((1, 2, 2, 4), jnp.bfloat16)
    assert add_noise(half, half, np.float32(0.5)).dtype == jnp.float32
    for kind in PREDICTION_TYPES:
        assert {a.dtype for a in to_x0_eps(kind, half, half, np.float32(0.5))} == {jnp.dtype("float32")}


def test_the_noise_level_may_be_traced():
    convert = jax.jit(lambda a: to_x0_eps("epsilon", jnp.ones((1, 2)), jnp.ones((1, 2)), a)[0])
    np.testing.assert_allclose(convert(0.5), (1 - np.sqrt(0.5)) / np.sqrt(0.5), rtol=1e-6)


def test_an_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match="'flow'; accepted: epsilon, v_prediction, sample"):
        to_x0_eps("flow", jnp.ones(1), jnp.ones(1), np.float32(0.5))
