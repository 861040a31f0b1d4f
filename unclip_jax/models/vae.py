"""The autoencoder between images and latents: AutoencoderKL (Rombach et al. 2022, arXiv:2112.10752).

Its factor is 8 in every checkpoint of the family except the x4 upscaler's, whose three levels give 4.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from unclip_jax.models.attention import attend
from unclip_jax.models.configs import VAEConfig
from unclip_jax.models.layers import Conv, GroupNorm, Linear, ResnetBlock
from unclip_jax.models.posterior import Posterior, posterior
from unclip_jax.models.upsampling import upsample_and_convolve


class SelfAttention(nnx.Module):
    """One-head attention of a feature map over itself, with its norm and residual. (B, H, W, C) -> the same."""

    def __init__(self, channels: int, groups: int, chunk: int | None, **kw: Any):
        self.chunk = chunk
        self.norm = GroupNorm(channels, groups, epsilon=1e-6, param_dtype=kw["param_dtype"])
        self.to_q = Linear(channels, channels, **kw)
        self.to_k = Linear(channels, channels, **kw)
        self.to_v = Linear(channels, channels, **kw)
        self.to_out = Linear(channels, channels, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        tokens = self.norm(x).reshape(b, h * w, 1, c)  # (B, T, 1, C)
        out = attend(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens), chunk=self.chunk)
        return x + self.to_out(out).reshape(x.shape)


class Level(nnx.Module):
    """The resnets of one resolution and the convolution to the next, or None. The caller applies `resample`."""

    def __init__(self, resnets: list[ResnetBlock], resample: Conv | None):
        self.resnets = nnx.List(resnets)
        self.resample = resample


class Middle(nnx.Module):
    """Resnet, attention, resnet at the lowest resolution. Call: (B, H, W, C) -> the same."""

    def __init__(self, channels: int, config: VAEConfig, chunk: int | None, **kw: Any):
        self.resnets = nnx.List([_resnet(channels, channels, config, **kw) for _ in range(2)])
        self.attention = SelfAttention(channels, config.norm_groups, chunk, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.resnets[1](self.attention(self.resnets[0](x)))


class Encoder(nnx.Module):
    """Images to the posterior's moments. Call: (B, H, W, in_channels) -> (B, H/f, W/f, 2 latent_channels)."""

    def __init__(self, config: VAEConfig, chunk: int | None, **kw: Any):
        width = config.block_out_channels[0]
        self.conv_in = Conv(config.in_channels, width, **kw)
        levels = []
        for index, out in enumerate(config.block_out_channels):
            resnets = []
            for _ in range(config.layers_per_block):
                resnets.append(_resnet(width, out, config, **kw))
                width = out
            # Padded at the right and the bottom only, unlike the UNet's.
            last = index == len(config.block_out_channels) - 1
            levels.append(Level(resnets, None if last else Conv(out, out, stride=2, padding=((0, 1), (0, 1)), **kw)))
        self.down_blocks = nnx.List(levels)
        self.mid_block = Middle(width, config, chunk, **kw)
        self.conv_norm_out = GroupNorm(width, config.norm_groups, epsilon=1e-6, param_dtype=kw["param_dtype"])
        self.conv_out = Conv(width, 2 * config.latent_channels, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for level in self.down_blocks:
            for resnet in level.resnets:
                x = resnet(x)
            if level.resample is not None:
                x = level.resample(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latents to images. Call: (B, h, w, latent_channels) -> (B, f h, f w, in_channels)."""

    def __init__(self, config: VAEConfig, chunk: int | None, **kw: Any):
        channels = config.block_out_channels[::-1]
        width = channels[0]
        self.conv_in = Conv(config.latent_channels, width, **kw)
        self.mid_block = Middle(width, config, chunk, **kw)
        levels = []
        for index, out in enumerate(channels):
            resnets = []
            for _ in range(config.layers_per_block + 1):
                resnets.append(_resnet(width, out, config, **kw))
                width = out
            levels.append(Level(resnets, Conv(out, out, **kw) if index < len(channels) - 1 else None))
        self.up_blocks = nnx.List(levels)
        self.conv_norm_out = GroupNorm(width, config.norm_groups, epsilon=1e-6, param_dtype=kw["param_dtype"])
        self.conv_out = Conv(width, config.in_channels, **kw)

    def __call__(self, z: jax.Array) -> jax.Array:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            for resnet in level.resnets:
                x = resnet(x)
            if level.resample is not None:
                x = upsample_and_convolve(level.resample, x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class VAE(nnx.Module):
    """The autoencoder. Its latents are unscaled: multiply by `config.scaling_factor` for the UNet.

    Args:
        config: The architecture.
        dtype: The dtype of computation.
        param_dtype: The dtype of storage.
        attention_chunk: The number of positions that the attention of the lowest resolution takes at a time; None
            leaves that to the platform.
        rngs: The random keys for the parameters.
    """

    def __init__(
        self,
        config: VAEConfig,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        attention_chunk: int | None = None,
        rngs: nnx.Rngs,
    ):
        kw: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.dtype = dtype
        self.encoder = Encoder(config, attention_chunk, **kw)
        self.quant_conv = Conv(2 * config.latent_channels, 2 * config.latent_channels, 1, **kw)
        self.post_quant_conv = Conv(config.latent_channels, config.latent_channels, 1, **kw)
        self.decoder = Decoder(config, attention_chunk, **kw)

    def encode(self, x: jax.Array) -> Posterior:
        """Encodes images (B, H, W, 3) in -1..1, with H and W multiples of `config.factor`."""
        return posterior(self.moments(x))

    def moments(self, x: jax.Array) -> jax.Array:
        """The moments of `encode`'s posterior: (B, H/f, W/f, 2 latent_channels) float32."""
        return self.quant_conv(self.encoder(x.astype(self.dtype))).astype(jnp.float32)

    def decode(self, z: jax.Array) -> jax.Array:
        """Decodes unscaled latents (B, h, w, latent_channels) to images (B, f h, f w, 3) float32, about -1..1."""
        return self.decoder(self.post_quant_conv(z.astype(self.dtype))).astype(jnp.float32)


def _resnet(in_channels: int, out_channels: int, config: VAEConfig, **kw: Any) -> ResnetBlock:
    return ResnetBlock(in_channels, out_channels, groups=config.norm_groups, epsilon=1e-6, **kw)
