"""The live comparisons fail when a constant of a network is wrong: each is broken on purpose, one at a time."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.models import comparisons
from tests.models.comparisons import TOLERANCE
from unclip_jax.checkpoints.networks import abstract_network
from unclip_jax.models import attention, clip, layers, unet_blocks, unet_encoder, vae

pytestmark = pytest.mark.parity


def wrong_epsilon(monkeypatch, old, new):
    """Group norms that have `old` get `new`."""
    build = layers.GroupNorm.__init__

    def init(self, *arguments, epsilon, **options):
        build(self, *arguments, epsilon=new if epsilon == old else epsilon, **options)

    monkeypatch.setattr(layers.GroupNorm, "__init__", init)


def wrong_layer_norm(monkeypatch):
    def layer_norm(width, **options):
        return nnx.LayerNorm(width, **{**options, "epsilon": 1e-6}, use_fast_variance=False)

    for module in (clip, unet_blocks):
        monkeypatch.setattr(module, "layer_norm", layer_norm)


def wrong_padding(monkeypatch, old, new):
    """Strided convolutions that pad as `old` pad as `new`."""
    build = layers.Conv.__init__

    def init(self, *arguments, padding=None, **options):
        build(self, *arguments, padding=new if padding == old else padding, **options)

    monkeypatch.setattr(layers.Conv, "__init__", init)


def tanh_gelu(monkeypatch):
    for module in (clip, unet_blocks):
        monkeypatch.setattr(module, "gelu", jax.nn.gelu)


def exact_for_quick(monkeypatch):
    monkeypatch.setattr(clip, "activate", lambda kind, x: jax.nn.gelu(x, approximate=False))


def sine_first(monkeypatch):
    right = unet_encoder.timestep_embedding

    def swapped(timesteps, dim, **options):
        return jnp.roll(right(timesteps, dim, **options), dim // 2, axis=-1)

    monkeypatch.setattr(unet_encoder, "timestep_embedding", swapped)


def shifted_frequencies(monkeypatch):
    right = unet_encoder.timestep_embedding
    # diffusers' downscale_freq_shift=1 divides by half - 1: the same as another longest period.
    monkeypatch.setattr(unet_encoder, "timestep_embedding", lambda t, dim: right(t, dim, 10000.0 ** (16 / 15)))


def wrong_attention_scale(monkeypatch):
    right = attention.attend
    for module in (clip, unet_blocks, vae):
        monkeypatch.setattr(module, "attend", lambda q, *rest, **options: right(q * 1.01, *rest, **options))


def fewer_groups(monkeypatch):
    build = layers.GroupNorm.__init__
    monkeypatch.setattr(layers.GroupNorm, "__init__", lambda self, c, groups, **k: build(self, c, groups // 2, **k))


def gate_before_value(monkeypatch):
    right = unet_blocks.FeedForward.__call__

    def swapped(self, x):
        kernel, bias = self.proj_in.kernel, self.proj_in.bias
        half = bias.shape[0] // 2
        flipped = nnx.clone(self)
        flipped.proj_in.kernel[...] = jnp.roll(kernel[...], half, axis=-1)
        flipped.proj_in.bias[...] = jnp.roll(bias[...], half)
        return right(flipped, x)

    monkeypatch.setattr(unet_blocks.FeedForward, "__call__", swapped)


def no_causal_mask(monkeypatch):
    right = attention.attend
    monkeypatch.setattr(clip, "attend", lambda q, k, v, bias=None: right(q, k, v))


MUTATIONS = {
    "UNet, norm epsilon of the residual blocks": (comparisons.unet_error, wrong_epsilon, 1e-5, 1e-6),
    "UNet, norm epsilon of the transformers": (comparisons.unet_error, wrong_epsilon, 1e-6, 1e-5),
    "UNet, layer norm epsilon": (comparisons.unet_error, wrong_layer_norm),
    "UNet, downsampling pads right and bottom": (
        comparisons.unet_error,
        wrong_padding,
        ((1, 1), (1, 1)),
        ((0, 2), (0, 2)),
    ),
    "UNet, approximate GELU": (comparisons.unet_error, tanh_gelu),
    "UNet, sine before cosine": (comparisons.unet_error, sine_first),
    "UNet, frequencies shifted": (comparisons.unet_error, shifted_frequencies),
    "UNet, attention scale": (comparisons.unet_error, wrong_attention_scale),
    "UNet, half as many groups": (comparisons.unet_error, fewer_groups),
    "UNet, gate and value swapped": (comparisons.unet_error, gate_before_value),
    "VAE, norm epsilon": (lambda: max(comparisons.vae_errors()), wrong_epsilon, 1e-6, 1e-5),
    "VAE, downsampling pads all sides": (
        lambda: max(comparisons.vae_errors()),
        wrong_padding,
        ((0, 1), (0, 1)),
        ((1, 0), (1, 0)),
    ),
    "VAE, attention scale": (lambda: max(comparisons.vae_errors()), wrong_attention_scale),
    "text H, approximate GELU": (comparisons.text_error, tanh_gelu),
    "text L, exact GELU": (lambda: comparisons.text_error("L"), exact_for_quick),
    "text, layer norm epsilon": (comparisons.text_error, wrong_layer_norm),
    "text, no causal mask": (comparisons.text_error, no_causal_mask),
    "vision H, approximate GELU": (comparisons.vision_error, tanh_gelu),
    "vision L, exact GELU": (lambda: comparisons.vision_error("L"), exact_for_quick),
    "vision, layer norm epsilon": (comparisons.vision_error, wrong_layer_norm),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_constant_fails_the_comparison(name, monkeypatch):
    compare, mutate, *values = MUTATIONS[name]
    mutate(monkeypatch, *values)
    abstract_network.cache_clear()  # structures keep the constants that they were built with
    try:
        error = compare()
        assert error > 2 * TOLERANCE
    finally:
        abstract_network.cache_clear()


def test_unbroken_they_pass():
    """The same functions, nothing mutated: what test_networks_parity asserts case by case."""
    errors = [comparisons.unet_error(), *comparisons.vae_errors()]
    errors += [f(name) for f in (comparisons.text_error, comparisons.vision_error) for name in comparisons.TOWERS]
    assert max(errors) < TOLERANCE
