"""The layers that the UNet and the VAE share: convolution, normalisation, the residual block, resampling.

Every default that differs between JAX and the PyTorch original is written at the call: epsilons, paddings, the exact
GELU. Norm statistics are float32, whatever dtype the network computes in.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from unclip_jax.models.convolution import convolve
from unclip_jax.models.partition import read_weight
from unclip_jax.models.precision import precision_of

Padding = tuple[tuple[int, int], tuple[int, int]]


def or_zeros(initializer: Any) -> Any:
    """An initialiser that makes zeros where there is no key, in a network of which only the shapes are wanted.

    Tracing random numbers that nothing reads would take most of the time that building a network takes.
    """

    def initial(key: jax.Array | None, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jnp.zeros(shape, dtype) if key is None else initializer(key, shape, dtype)

    return initial


# Flax's own.
KERNEL_INIT = or_zeros(nnx.initializers.lecun_normal())
EMBEDDING_INIT = or_zeros(nnx.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0))


class Linear(nnx.Linear):
    """Flax's layer, also without keys, exact in float32. Call: (..., in_features) -> (..., out_features)."""

    def __init__(self, in_features: int, out_features: int, **kw: Any):
        super().__init__(in_features, out_features, kernel_init=KERNEL_INIT, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]  # nobody gives it a sharding
        x, kernel, bias = self._promoted(x)
        y = _product(x, kernel)
        return y if bias is None else y + jnp.reshape(bias, (1,) * (y.ndim - 1) + (-1,))

    def halves(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The first and the second half of the output, each from a product of its own."""
        x, kernel, bias = self._promoted(x)
        assert bias is not None
        parts = zip(jnp.split(kernel, 2, axis=1), jnp.split(bias, 2), strict=True)
        first, second = (_product(x, k) + b for k, b in parts)
        return first, second

    def _promoted(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """x, the kernel and the bias in the dtype of computation."""
        x, kernel = read_weight(x, self.kernel)
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = self.promote_dtype((x, kernel, bias), dtype=self.dtype)
        return x, kernel, bias


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """(..., in) times (in, out), in the precision of the dtype."""
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), precision_of(kernel.dtype))


class Embed(nnx.Embed):
    """Flax's layer, also without keys. Call: (...) int -> (..., features)."""

    def __init__(self, num_embeddings: int, features: int, **kw: Any):
        super().__init__(num_embeddings, features, embedding_init=EMBEDDING_INIT, **kw)

    def __call__(self, inputs: jax.Array) -> jax.Array:  # type: ignore[override]  # nobody gives it a sharding
        inputs, table = read_weight(inputs, self.embedding)
        (table,) = self.promote_dtype((table,), dtype=self.dtype)
        return jnp.take(table, inputs, axis=0)


class Conv(nnx.Module):
    """2-D convolution. Call: (B, H, W, in_channels) -> (B, H', W', out_channels); kernel HWIO."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        padding: Padding | None = None,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        shape = (kernel_size, kernel_size, in_channels, out_channels)
        self.kernel = nnx.Param(KERNEL_INIT(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(jnp.zeros((out_channels,), param_dtype)) if use_bias else None
        self.stride = stride
        self.padding = ((kernel_size // 2,) * 2,) * 2 if padding is None else padding
        self.dtype = dtype

    def __call__(self, x: jax.Array, padding: Padding | None = None) -> jax.Array:
        """Convolves x. padding: instead of the layer's own, for parts of an image."""
        dtype = x.dtype if self.dtype is None else self.dtype
        x, kernel = read_weight(x, self.kernel)
        kernel = kernel.astype(dtype)
        bias = None if self.bias is None else self.bias[...].astype(dtype)
        return convolve(x.astype(dtype), kernel, bias, stride=self.stride, padding=padding or self.padding)


class GroupNorm(nnx.Module):
    """Group normalisation over (H, W, channels / groups). Call: (B, H, W, C) -> (B, H, W, C), in x's dtype."""

    def __init__(
        self,
        channels: int,
        groups: int,
        *,
        epsilon: float,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        if channels % groups:
            raise ValueError(f"GroupNorm: channels is {channels}; want a multiple of groups, {groups}")
        self.scale = nnx.Param(jnp.ones((channels,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((channels,), param_dtype))
        self.groups = groups
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.apply(x, *self.statistics(x))

    def statistics(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and variance of each channel's group, (B, C) float32."""
        x32 = x.astype(jnp.float32)
        if x.dtype == jnp.bfloat16:
            # Read once for both. What the difference loses is less than x has lost by its eight bits.
            mean, squares = (self._group_mean(values.mean(axis=(1, 2))) for values in (x32, jnp.square(x32)))
            return mean, jnp.maximum(squares - jnp.square(mean), 0)
        mean = self._group_mean(x32.mean(axis=(1, 2)))
        return mean, self._group_mean(jnp.square(x32 - mean[:, None, None, :]).mean(axis=(1, 2)))

    def apply(self, x: jax.Array, mean: jax.Array, variance: jax.Array) -> jax.Array:
        """Normalises x, or a part of the image, by the `statistics` of the whole."""
        x32 = x.astype(jnp.float32) - mean[:, None, None, :]
        scale = jax.lax.rsqrt(variance + self.epsilon) * self.scale[...].astype(jnp.float32)
        return (x32 * scale[:, None, None, :] + self.bias[...].astype(jnp.float32)).astype(x.dtype)

    def _group_mean(self, by_channel: jax.Array) -> jax.Array:
        """(B, C) -> (B, C). Means over space come first: the large reduction then runs along contiguous channels."""
        by_group = by_channel.reshape(len(by_channel), self.groups, -1).mean(axis=-1)  # (B, G)
        return jnp.repeat(by_group, by_channel.shape[-1] // self.groups, axis=-1)


def layer_norm(width: int, *, epsilon: float = 1e-5, dtype: Any, param_dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm with two-pass variance and PyTorch's epsilon.

    Every transformer here uses that epsilon, except the depth estimator's.
    """
    return nnx.LayerNorm(
        width, epsilon=epsilon, use_fast_variance=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
    )


class ResnetBlock(nnx.Module):
    """Two norm-SiLU-conv halves around a residual, with an optional time embedding added between them.

    Call: x (B, H, W, in_channels), emb (B, time_channels) or None -> (B, H, W, out_channels). The UNet's blocks have
    epsilon 1e-5 and a time embedding, the VAE's 1e-6 and none.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int,
        epsilon: float,
        time_channels: int | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kw: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.norm1 = GroupNorm(in_channels, groups, epsilon=epsilon, param_dtype=param_dtype)
        self.conv1 = Conv(in_channels, out_channels, **kw)
        self.time_emb_proj = None if time_channels is None else Linear(time_channels, out_channels, **kw)
        self.norm2 = GroupNorm(out_channels, groups, epsilon=epsilon, param_dtype=param_dtype)
        self.conv2 = Conv(out_channels, out_channels, **kw)
        self.conv_shortcut = None if in_channels == out_channels else Conv(in_channels, out_channels, 1, **kw)

    def __call__(self, x: jax.Array, emb: jax.Array | None = None) -> jax.Array:
        h = self.conv1(nnx.silu(self.norm1(x)))
        if self.time_emb_proj is not None and emb is not None:
            h = h + self.time_emb_proj(nnx.silu(emb))[:, None, None, :]
        h = self.conv2(nnx.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU by the error function, as in PyTorch; jax.nn's, by its complement, takes twice as long.

    x: any shape -> the same.
    """
    return 0.5 * x * (1.0 + erf(x * np.float32(0.5**0.5)))


@jax.custom_jvp
def erf(x: jax.Array) -> jax.Array:
    """The error function. Its derivative is written here, since JAX 0.12's own cannot be taken in a `shard_map`.

    x: any shape, floating -> the same.
    """
    return jax.lax.erf(x)


erf.defjvps(lambda tangent, _, x: 2 / math.sqrt(math.pi) * (tangent * jnp.exp(-jnp.square(x))))


def upsample_nearest(x: jax.Array) -> jax.Array:
    """Doubles height and width by repetition. x: (B, H, W, C) -> (B, 2 H, 2 W, C)."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
