"""The upscaler's small image: noised as the original recorded it, its levels checked."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden_weights import GOLDEN
from unclip_jax.conditioning.upscale import check_levels, noise_low_res
from unclip_jax.sampling.schedule import NoiseSchedule, alphas_cumprod

# Of the published upscaler: what the original calls linear.
SCHEDULE = NoiseSchedule(beta_start=0.0001, beta_end=0.02, beta_schedule="scaled_linear")


def test_the_upscalers_channels_are_the_originals_recording():
    golden = np.load(GOLDEN / "conditioning.npz")
    pixels, noise, want = (np.moveaxis(golden[f"low_res{n}"], 1, -1) for n in ("", "_noise", "_noised"))
    table = alphas_cumprod(SCHEDULE, "original")
    got = noise_low_res(pixels, golden["noise_level"], noise, alphas_cumprod=table)
    np.testing.assert_allclose(got, want, atol=2e-7, rtol=0)  # 1.2e-7
    # Level 20, as the specification writes it down.
    pair = noise_low_res(
        jnp.eye(2)[:, None, None], jnp.array([20, 20]), 1 - jnp.eye(2)[:, None, None], alphas_cumprod=table
    )
    np.testing.assert_allclose(pair[0].ravel(), [0.99864973, 0.05194921], atol=1e-7)


def test_each_image_has_its_level():
    table = alphas_cumprod(SCHEDULE, "diffusers")
    pixels, noise = jnp.ones((2, 4, 4, 3)), jnp.zeros((2, 4, 4, 3))
    out = noise_low_res(pixels, jnp.array([0, 350]), noise, alphas_cumprod=table)
    np.testing.assert_allclose(out[:, 0, 0, 0], np.sqrt(table[[0, 350]]), rtol=1e-6)


def test_levels():
    np.testing.assert_array_equal(check_levels(20, 3), [20, 20, 20])
    np.testing.assert_array_equal(check_levels([0, np.int64(350)], 2), [0, 350])
    for value in (-1, 351, 2.5, True, "20", None, [20, 351]):
        with pytest.raises(ValueError, match=r"noise_level is .*; want an integer from 0 to 350"):
            check_levels(value, 2)
    with pytest.raises(ValueError, match="noise_level is 20; want an integer from 0 to 9"):
        check_levels(20, 1, rows=10)
    with pytest.raises(ValueError, match="noise_level has 3 values for 2 images"):
        check_levels([1, 2, 3], 2)
