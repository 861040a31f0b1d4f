"""The autoencoder's losses against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from unclip_jax.models.vae import Posterior
from unclip_jax.training import vae_losses


def pictures(seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (2, 6, 5, 3)).astype(np.float32)


@pytest.mark.parametrize(("mean", "logvar"), [(0.0, 0.0), (1.5, -1.0), (-0.3, 0.7)])
def test_divergence_is_the_integral(mean, logvar):
    deviation = np.exp(logvar / 2)

    def density(x, m, s):
        return np.exp(-((x - m) ** 2) / (2 * s**2)) / (s * np.sqrt(2 * np.pi))

    def integrand(x):
        p = density(x, mean, deviation)
        return p * np.log(p / density(x, 0, 1))

    want, _ = integrate.quad(integrand, mean - 8 * deviation, mean + 8 * deviation)
    shape = (2, 3, 4, 1)
    made = vae_losses.kl_divergence(Posterior(jnp.full(shape, mean), jnp.full(shape, logvar)))
    np.testing.assert_allclose(made, 12 * want, atol=1e-4)


def test_terms_add_up():
    made, wanted = pictures(0), pictures(1)
    nothing = Posterior(jnp.zeros((2, 2, 2, 4)), jnp.zeros((2, 2, 2, 4)))
    some = Posterior(jnp.ones((2, 2, 2, 4)), jnp.zeros((2, 2, 2, 4)))
    absolute = np.abs(made - wanted).mean((1, 2, 3))
    squared = np.square(made - wanted).mean((1, 2, 3))
    losses = vae_losses.autoencoding_losses
    np.testing.assert_allclose(losses(made, wanted, nothing, kl_weight=3.0), absolute, rtol=1e-5)
    np.testing.assert_allclose(losses(made, wanted, some, kl_weight=3.0), absolute + 1.5, rtol=1e-5)  # 1/2 a number
    np.testing.assert_allclose(
        losses(made, wanted, nothing, kl_weight=0.0, squared_weight=2.0), absolute + 2 * squared, rtol=1e-5
    )

    def feature(a, b):
        return jnp.abs(a.mean((1, 2, 3)) - b.mean((1, 2, 3)))

    np.testing.assert_allclose(
        losses(made, wanted, nothing, kl_weight=0.0, perceptual=feature, perceptual_weight=0.5),
        absolute + 0.5 * feature(made, wanted),
        rtol=1e-5,
    )


def test_gradient_difference_sees_edges_alone():
    picture = pictures()
    assert vae_losses.gradient_difference(picture + 0.5, picture).max() < 1e-6
    blurred = (picture + np.roll(picture, 1, axis=2)) / 2
    assert (vae_losses.gradient_difference(blurred, picture) > 0.1).all()
    with_it = vae_losses.autoencoding_losses(
        blurred, picture, Posterior(jnp.zeros((2, 1, 1, 1)), jnp.zeros((2, 1, 1, 1))), kl_weight=0, gradient_weight=1.0
    )
    want = np.abs(blurred - picture).mean((1, 2, 3)) + vae_losses.gradient_difference(blurred, picture)
    np.testing.assert_allclose(with_it, want, rtol=1e-5)


def test_psnr():
    picture = pictures()
    np.testing.assert_allclose(vae_losses.psnr(picture + 0.2, picture), 20.0, rtol=1e-4)  # a tenth of the range
    assert np.isfinite(vae_losses.psnr(picture, picture)).all()
    jax.grad(lambda p: vae_losses.psnr(p, picture + 0.1).sum())(jnp.asarray(picture))
