"""The tiny autoencoder, TAESD: one network to the latents of another autoencoder, and one back (AutoencoderTiny).

Its encoder predicts the UNet's latents themselves, not a distribution. Source: github.com/madebyollin/taesd.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from unclip_jax.models.configs import AutoencoderTinyConfig
from unclip_jax.models.layers import Conv
from unclip_jax.models.upsampling import upsample_and_convolve

# Latents beyond this are held back, smoothly.
LIMIT = 3.0


class Block(nnx.Module):
    """Three convolutions around a residual, and a ReLU at the end. Call: (B, H, W, C) -> the same."""

    def __init__(self, channels: int, **kw: Any):
        self.conv1 = Conv(channels, channels, **kw)
        self.conv2 = Conv(channels, channels, **kw)
        self.conv3 = Conv(channels, channels, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.conv3(nnx.relu(self.conv2(nnx.relu(self.conv1(x))))) + x)


class Level(nnx.Module):
    """The blocks of one resolution and the convolution to the next, or None. The caller applies `resample`."""

    def __init__(self, channels: int, blocks: int, resample: Conv | None, **kw: Any):
        self.blocks = nnx.List([Block(channels, **kw) for _ in range(blocks)])
        self.resample = resample


class Encoder(nnx.Module):
    """Images in 0..1 to latents. Call: (B, H, W, in_channels) -> (B, H/f, W/f, latent_channels)."""

    def __init__(self, config: AutoencoderTinyConfig, **kw: Any):
        width, counts = config.encoder_block_out_channels[0], config.num_encoder_blocks
        self.conv_in = Conv(config.in_channels, width, **kw)
        levels = []
        for index, count in enumerate(counts):
            last = index == len(counts) - 1
            levels.append(
                Level(width, count, None if last else Conv(width, width, stride=2, use_bias=False, **kw), **kw)
            )
        self.down_blocks = nnx.List(levels)
        self.conv_out = Conv(width, config.latent_channels, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for level in self.down_blocks:
            for block in level.blocks:
                x = block(x)
            if level.resample is not None:
                x = level.resample(x)
        return self.conv_out(x)


class Decoder(nnx.Module):
    """Latents to images in 0..1. Call: (B, h, w, latent_channels) -> (B, f h, f w, in_channels)."""

    def __init__(self, config: AutoencoderTinyConfig, **kw: Any):
        width, counts = config.decoder_block_out_channels[0], config.num_decoder_blocks
        self.conv_in = Conv(config.latent_channels, width, **kw)
        levels = []
        for index, count in enumerate(counts):
            last = index == len(counts) - 1
            levels.append(Level(width, count, None if last else Conv(width, width, use_bias=False, **kw), **kw))
        self.up_blocks = nnx.List(levels)
        self.conv_out = Conv(width, config.in_channels, **kw)

    def __call__(self, z: jax.Array) -> jax.Array:
        x = nnx.relu(self.conv_in(jnp.tanh(z / LIMIT) * LIMIT))
        for level in self.up_blocks:
            for block in level.blocks:
                x = block(x)
            if level.resample is not None:
                x = upsample_and_convolve(level.resample, x)
        return self.conv_out(x)


class AutoencoderTiny(nnx.Module):
    """The autoencoder. Its latents times `config.scaling_factor`, 1 in those of TAESD, are the UNet's.

    Args:
        config: The architecture.
        dtype: The dtype of computation.
        param_dtype: The dtype of storage.
        rngs: The random keys for the parameters.
    """

    def __init__(
        self,
        config: AutoencoderTinyConfig,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kw: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.dtype = dtype
        self.encoder = Encoder(config, **kw)
        self.decoder = Decoder(config, **kw)

    def encode(self, x: jax.Array) -> jax.Array:
        """Encodes images (B, H, W, 3) in -1..1, with H and W multiples of `config.factor`.

        Returns latents (B, H/f, W/f, latent_channels) float32.
        """
        return self.encoder((x / 2 + 0.5).astype(self.dtype)).astype(jnp.float32)

    def moments(self, x: jax.Array) -> jax.Array:
        """What is known of an image's latents, as `VAE.moments` says it: here the latents, without a variance."""
        return self.encode(x)

    def decode(self, z: jax.Array) -> jax.Array:
        """Decodes unscaled latents (B, h, w, latent_channels) to images (B, f h, f w, 3) float32, about -1..1."""
        return self.decoder(z.astype(self.dtype)).astype(jnp.float32) * 2 - 1
