"""Perturbed self-attention in the UNet: which rows, in which layers. Live: tests/sampling/test_guidance_parity.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.small_models import TEXT_TO_IMAGE
from unclip_jax.checkpoints.networks import abstract_network
from unclip_jax.models.unet import UNet
from unclip_jax.models.unet_blocks import Attention

ROWS = jnp.array([False, True, False])


@pytest.fixture(scope="module")
def unet():
    network, rng = abstract_network(UNet, TEXT_TO_IMAGE.unet), np.random.default_rng(0)
    return network.merge({n: jnp.asarray(rng.normal(0, 0.2, s.shape), s.dtype) for n, s in network.params.items()})


def test_an_identity_map_hands_on_every_token_its_value():
    attention = Attention(32, 32, heads=2, chunk=None, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (3, 5, 32))
    plain = attention(x, attention.encode(x))
    perturbed = attention(x, attention.encode(x), ROWS)
    np.testing.assert_array_equal(perturbed[0::2], plain[0::2])
    np.testing.assert_allclose(perturbed[1], attention.to_out(attention.to_v(x))[1], rtol=1e-5, atol=1e-6)


def test_attention_is_perturbed_in_the_rows_and_layers_asked_for(unet):
    x, context = jax.random.normal(jax.random.key(0), (3, 8, 8, 4)), jax.random.normal(jax.random.key(1), (3, 7, 32))
    emb, text = unet.embed_time(jnp.full(3, 500.0)), unet.encode_context(context)
    run = jax.jit(lambda perturbed: unet.denoise(x, emb, text, perturbed))
    plain, middle = run(None), run(unet.perturb_attention(ROWS))
    np.testing.assert_allclose(middle[0::2], plain[0::2], rtol=1e-5, atol=1e-6)
    assert np.abs(middle[1] - plain[1]).max() > 1e-5
    np.testing.assert_allclose(run(unet.perturb_attention(ROWS & False)), plain, rtol=1e-5, atol=1e-6)
    # One transformer down (in the second block), one in the middle, two up (in the first).
    for layers, want in (
        (("down.1",), [1, 0, 0, 0]),
        (("mid", "up.0.1"), [0, 1, 0, 1]),
        (("up", "down.1.0"), [1, 0, 1, 1]),
    ):
        assert [given is not None for given in unet.perturb_attention(ROWS, layers)] == [bool(w) for w in want]


def test_features_are_what_the_blocks_give(unet):
    x, context = jax.random.normal(jax.random.key(0), (3, 8, 8, 4)), jax.random.normal(jax.random.key(1), (3, 7, 32))
    given, names = (x, jnp.full(3, 500.0), context), unet.layer_names
    assert names == ["down.0", "down.1", "mid", "up.0", "up.1"]
    features, prediction = jax.jit(lambda: (unet.features(*given, layers=names), unet(*given)))()
    sizes = {"down.0": 4, "down.1": 4, "mid": 4, "up.0": 8, "up.1": 8}
    assert {name: array.shape for name, array in features.items()} == {n: (3, s, s, 32) for n, s in sizes.items()}
    last = unet.conv_out(nnx.silu(unet.conv_norm_out(features["up.1"])))
    np.testing.assert_allclose(last, prediction, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"layers has 'up.2'; accepted: down.0, down.1, mid, up.0, up.1"):
        unet.features(*given, layers=["mid", "up.2"])


@pytest.mark.parametrize("layer", ["middle", "down.0", "up.0.2", "up.", ""])
def test_layers_that_are_none(unet, layer):
    with pytest.raises(ValueError, match=r"perturbed layer '.*' has no self-attention; accepted: down.1.0, mid.0"):
        unet.perturb_attention(ROWS, ("mid", layer))
