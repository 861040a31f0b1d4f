"""Inception v3 as the Fréchet Inception Distance uses it (Szegedy et al. 2016, arXiv:1512.00567; Heusel et al. 2017).

This is the network of 2015-12-05, whose pooling excludes padding from its means and whose last block takes maxima: not
the one that torchvision classifies with. Modules have the names of the published weights.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from unclip_jax.models.convolution import convolve
from unclip_jax.models.resize import resize_bilinear

SIZE = 299
FEATURES = 2048
EPSILON = 1e-3


class ConvNorm(nnx.Module):
    """Convolution, batch normalisation by stored statistics, ReLU. (B, H, W, C) -> (B, H', W', C')."""

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
        rngs: nnx.Rngs,
    ):
        size = (kernel, kernel) if isinstance(kernel, int) else kernel
        pad = (padding, padding) if isinstance(padding, int) else padding
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (*size, channels, out), jnp.float32))
        self.scale, self.bias = nnx.Param(jnp.ones(out)), nnx.Param(jnp.zeros(out))
        self.mean, self.variance = nnx.Param(jnp.zeros(out)), nnx.Param(jnp.ones(out))
        self.stride, self.padding = stride, ((pad[0], pad[0]), (pad[1], pad[1]))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = convolve(x, self.kernel[...], stride=self.stride, padding=self.padding)
        scale = self.scale[...] * jax.lax.rsqrt(self.variance[...] + EPSILON)
        return nnx.relu((x - self.mean[...]) * scale + self.bias[...])


def _chain(x: jax.Array, *layers: ConvNorm) -> jax.Array:
    for layer in layers:
        x = layer(x)
    return x


def _max_pool(x: jax.Array, stride: int, padding: int = 0) -> jax.Array:
    return nnx.max_pool(x, (3, 3), (stride, stride), ((padding, padding),) * 2)


def _mean_pool(x: jax.Array) -> jax.Array:
    """3x3 means that keep the size; at the border, of the pixels inside."""
    return nnx.avg_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1)), count_include_pad=False)


class BlockA(nnx.Module):
    """35x35: one, 5x5, twice 3x3, pool."""

    def __init__(self, channels: int, pool: int, *, rngs: nnx.Rngs):
        self.branch1x1 = ConvNorm(channels, 64, 1, rngs=rngs)
        self.branch5x5_1 = ConvNorm(channels, 48, 1, rngs=rngs)
        self.branch5x5_2 = ConvNorm(48, 64, 5, padding=2, rngs=rngs)
        self.branch3x3dbl_1 = ConvNorm(channels, 64, 1, rngs=rngs)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, padding=1, rngs=rngs)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, padding=1, rngs=rngs)
        self.branch_pool = ConvNorm(channels, pool, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        five = _chain(x, self.branch5x5_1, self.branch5x5_2)
        three = _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3)
        return jnp.concatenate([self.branch1x1(x), five, three, self.branch_pool(_mean_pool(x))], axis=-1)


class BlockB(nnx.Module):
    """35x35 to 17x17."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.branch3x3 = ConvNorm(channels, 384, 3, stride=2, rngs=rngs)
        self.branch3x3dbl_1 = ConvNorm(channels, 64, 1, rngs=rngs)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, padding=1, rngs=rngs)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, stride=2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        three = _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3)
        return jnp.concatenate([self.branch3x3(x), three, _max_pool(x, 2)], axis=-1)


class BlockC(nnx.Module):
    """17x17: 7x7 as 1x7 and 7x1."""

    def __init__(self, channels: int, inner: int, *, rngs: nnx.Rngs):
        across: dict[str, Any] = {"kernel": (1, 7), "padding": (0, 3), "rngs": rngs}
        down: dict[str, Any] = {"kernel": (7, 1), "padding": (3, 0), "rngs": rngs}
        self.branch1x1 = ConvNorm(channels, 192, 1, rngs=rngs)
        self.branch7x7_1 = ConvNorm(channels, inner, 1, rngs=rngs)
        self.branch7x7_2 = ConvNorm(inner, inner, **across)
        self.branch7x7_3 = ConvNorm(inner, 192, **down)
        self.branch7x7dbl_1 = ConvNorm(channels, inner, 1, rngs=rngs)
        self.branch7x7dbl_2 = ConvNorm(inner, inner, **down)
        self.branch7x7dbl_3 = ConvNorm(inner, inner, **across)
        self.branch7x7dbl_4 = ConvNorm(inner, inner, **down)
        self.branch7x7dbl_5 = ConvNorm(inner, 192, **across)
        self.branch_pool = ConvNorm(channels, 192, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        one = _chain(x, self.branch7x7_1, self.branch7x7_2, self.branch7x7_3)
        two = _chain(
            x,
            self.branch7x7dbl_1,
            self.branch7x7dbl_2,
            self.branch7x7dbl_3,
            self.branch7x7dbl_4,
            self.branch7x7dbl_5,
        )
        return jnp.concatenate([self.branch1x1(x), one, two, self.branch_pool(_mean_pool(x))], axis=-1)


class BlockD(nnx.Module):
    """17x17 to 8x8."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.branch3x3_1 = ConvNorm(channels, 192, 1, rngs=rngs)
        self.branch3x3_2 = ConvNorm(192, 320, 3, stride=2, rngs=rngs)
        self.branch7x7x3_1 = ConvNorm(channels, 192, 1, rngs=rngs)
        self.branch7x7x3_2 = ConvNorm(192, 192, (1, 7), padding=(0, 3), rngs=rngs)
        self.branch7x7x3_3 = ConvNorm(192, 192, (7, 1), padding=(3, 0), rngs=rngs)
        self.branch7x7x3_4 = ConvNorm(192, 192, 3, stride=2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        three = _chain(x, self.branch3x3_1, self.branch3x3_2)
        seven = _chain(x, self.branch7x7x3_1, self.branch7x7x3_2, self.branch7x7x3_3, self.branch7x7x3_4)
        return jnp.concatenate([three, seven, _max_pool(x, 2)], axis=-1)


class BlockE(nnx.Module):
    """8x8; the last one pools maxima where the one before it pools means."""

    def __init__(self, channels: int, last: bool, *, rngs: nnx.Rngs):
        across: dict[str, Any] = {"kernel": (1, 3), "padding": (0, 1), "rngs": rngs}
        down: dict[str, Any] = {"kernel": (3, 1), "padding": (1, 0), "rngs": rngs}
        self.last = last
        self.branch1x1 = ConvNorm(channels, 320, 1, rngs=rngs)
        self.branch3x3_1 = ConvNorm(channels, 384, 1, rngs=rngs)
        self.branch3x3_2a = ConvNorm(384, 384, **across)
        self.branch3x3_2b = ConvNorm(384, 384, **down)
        self.branch3x3dbl_1 = ConvNorm(channels, 448, 1, rngs=rngs)
        self.branch3x3dbl_2 = ConvNorm(448, 384, 3, padding=1, rngs=rngs)
        self.branch3x3dbl_3a = ConvNorm(384, 384, **across)
        self.branch3x3dbl_3b = ConvNorm(384, 384, **down)
        self.branch_pool = ConvNorm(channels, 192, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        one = self.branch3x3_1(x)
        two = _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2)
        pooled = _max_pool(x, 1, 1) if self.last else _mean_pool(x)
        parts = [self.branch1x1(x), self.branch3x3_2a(one), self.branch3x3_2b(one)]
        parts += [self.branch3x3dbl_3a(two), self.branch3x3dbl_3b(two), self.branch_pool(pooled)]
        return jnp.concatenate(parts, axis=-1)


class Inception(nnx.Module):
    """Call: images (B, H, W, 3) in 0..1 of any size, resized to 299x299 -> features (B, 2048) float32."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2, rngs=rngs)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, rngs=rngs)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3, padding=1, rngs=rngs)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1, rngs=rngs)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, rngs=rngs)
        self.Mixed_5b = BlockA(192, 32, rngs=rngs)
        self.Mixed_5c = BlockA(256, 64, rngs=rngs)
        self.Mixed_5d = BlockA(288, 64, rngs=rngs)
        self.Mixed_6a = BlockB(288, rngs=rngs)
        self.Mixed_6b = BlockC(768, 128, rngs=rngs)
        self.Mixed_6c = BlockC(768, 160, rngs=rngs)
        self.Mixed_6d = BlockC(768, 160, rngs=rngs)
        self.Mixed_6e = BlockC(768, 192, rngs=rngs)
        self.Mixed_7a = BlockD(768, rngs=rngs)
        self.Mixed_7b = BlockE(1280, False, rngs=rngs)
        self.Mixed_7c = BlockE(2048, True, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = 2 * resize_bilinear(images.astype(jnp.float32), SIZE, SIZE, align_corners=False) - 1
        x = _max_pool(_chain(x, self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3), 2)
        x = _max_pool(_chain(x, self.Conv2d_3b_1x1, self.Conv2d_4a_3x3), 2)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x)))))
        return self.Mixed_7c(self.Mixed_7b(x)).mean(axis=(1, 2))
