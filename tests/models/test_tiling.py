"""Autoencoding in less memory: the same as whole, or as the tiles' rule says; and less memory indeed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.small_networks import random_network
from unclip_jax.models.configs import VAEConfig
from unclip_jax.models.tiling import decode_seamless, decode_tiled, encode_tiled
from unclip_jax.models.vae import VAE

CONFIG = VAEConfig(block_out_channels=(16, 32, 32), layers_per_block=1, norm_groups=8)


def random_vae(config=CONFIG, dtype=jnp.float32):
    return random_network(VAE, config, dtype).merge()


@pytest.fixture(scope="module")
def vae():
    return random_vae()


def latents(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal((*shape, 4), np.float32))


@pytest.mark.parametrize(("batch", "height", "width"), [(2, 1, 3), (1, 16, 12), (2, 11, 9)])
def test_seamless_is_whole(vae, batch, height, width):
    """Also at heights that no band divides, and those of one row."""
    z = latents(batch, height, width)
    np.testing.assert_allclose(
        jax.jit(decode_seamless)(vae, z), jax.jit(VAE.decode)(vae, z), atol=2e-5, rtol=2e-5
    )  # 2e-6


def test_seamless_in_half_precision():
    vae = random_vae(dtype=jnp.bfloat16)
    z = latents(1, 16, 16)
    want = np.asarray(jax.jit(VAE.decode)(vae, z))
    assert np.linalg.norm(jax.jit(decode_seamless)(vae, z) - want) < 0.02 * np.linalg.norm(want)


@pytest.mark.e2e
def test_seamless_needs_less_memory(vae):
    """By the compiled programs' own account, at a size where bands matter."""
    graphdef, state = nnx.split(vae)
    z = jax.ShapeDtypeStruct((1, 128, 128, 4), jnp.float32)

    def temporaries(decode):
        compiled = jax.jit(lambda state, z: decode(nnx.merge(graphdef, state), z)).lower(state, z).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = temporaries(lambda vae, z: vae.decode(z))
    assert temporaries(decode_seamless) < 0.7 * whole
    assert temporaries(lambda vae, z: decode_tiled(vae, z, 32)) < 0.7 * whole


@pytest.mark.e2e
def test_one_tile_is_the_whole_image(vae):
    z = latents(1, 16, 12)
    np.testing.assert_array_equal(decode_tiled(vae, z, 16), vae.decode(z))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 32, 48, 3), np.float32))
    for ours, want in zip(encode_tiled(vae, x, 48), vae.encode(x), strict=True):
        np.testing.assert_array_equal(ours, want)


@pytest.mark.e2e
def test_tiles_far_from_each_other_do_not_matter(vae):
    """What one corner shows does not depend on the opposite one, as it does in a whole decoding."""
    z = latents(1, 48, 48)
    changed = z.at[:, -8:, -8:].add(1.0)
    decode = jax.jit(decode_tiled, static_argnums=2)
    first, second = (decode(vae, a, 16) for a in (z, changed))
    assert first.shape == (1, 192, 192, 3)
    np.testing.assert_array_equal(first[:, :32, :32], second[:, :32, :32])
    assert np.abs(first - second)[:, -16:, -16:].max() > 1e-3


@pytest.mark.parametrize("tile", [0, -4, 6])
def test_tiles_have_a_quarter(vae, tile):
    with pytest.raises(ValueError, match="multiple of 4"):
        decode_tiled(vae, latents(1, 32, 32), tile)
    with pytest.raises(ValueError, match="multiple of 16"):
        encode_tiled(vae, jnp.zeros((1, 64, 64, 3)), 4 * tile + 2)
