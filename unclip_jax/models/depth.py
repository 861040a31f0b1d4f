"""The depth estimator of the depth-to-image checkpoint: MiDaS' DPT-hybrid (Ranftl et al. 2021, arXiv:2103.13413).

A ResNet with weight-standardised convolutions makes feature maps, a vision transformer continues from the last of them,
and a neck fuses two maps of each, from coarse to fine, into one depth value per pixel.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from unclip_jax.models.clip import run_layers, stack_layers
from unclip_jax.models.configs import PATCH, DepthConfig
from unclip_jax.models.convolution import convolve
from unclip_jax.models.layers import KERNEL_INIT, Conv, Embed, GroupNorm, Linear, gelu, layer_norm
from unclip_jax.models.partition import read_weight
from unclip_jax.models.resize import resize_bilinear


class StandardizedConv(nnx.Module):
    """Convolution with weights of mean 0 and variance 1 in each output channel (arXiv:1903.10520), SAME padding.

    Call: (B, H, W, in_channels) -> (B, ceil(H / stride), ceil(W / stride), out_channels). An odd row or column of
    padding is at the bottom or the right, as in TensorFlow, where these weights were trained.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        shape = (kernel_size, kernel_size, in_channels, out_channels)
        self.kernel = nnx.Param(KERNEL_INIT(rngs.params(), shape, param_dtype))
        self.stride = stride
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        x, kernel = read_weight(x, self.kernel)
        kernel = kernel.astype(jnp.float32)
        kernel = kernel - kernel.mean((0, 1, 2))
        kernel = kernel * jax.lax.rsqrt(jnp.square(kernel).mean((0, 1, 2)) + 1e-8)
        return convolve(x.astype(self.dtype), kernel.astype(self.dtype), stride=self.stride, padding="SAME")


class NormedConv(nnx.Module):
    """A standardised convolution followed by its group norm."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, groups: int, stride: int = 1, **kw: Any):
        self.conv = StandardizedConv(in_channels, out_channels, kernel_size, stride=stride, **kw)
        self.norm = GroupNorm(out_channels, groups, epsilon=1e-5, param_dtype=kw["param_dtype"])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.conv(x))


class Bottleneck(nnx.Module):
    """Three convolutions around a residual, the second with the stride. (B, H, W, C) -> (B, H/s, W/s, out_channels)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, *, stride: int, first: bool, **kw: Any):
        width = out_channels // 4
        self.conv1 = NormedConv(in_channels, width, 1, groups, **kw)
        self.conv2 = NormedConv(width, width, 3, groups, stride, **kw)
        self.conv3 = NormedConv(width, out_channels, 1, groups, **kw)
        self.downsample = NormedConv(in_channels, out_channels, 1, groups, stride, **kw) if first else None

    def __call__(self, x: jax.Array) -> jax.Array:
        h = nnx.relu(self.conv2(nnx.relu(self.conv1(x))))
        return nnx.relu(self.conv3(h) + (x if self.downsample is None else self.downsample(x)))


class Stage(nnx.Module):
    """The blocks of one resolution."""

    def __init__(self, blocks: list[Bottleneck]):
        self.blocks = nnx.List(blocks)

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return x


class Residual(nnx.Module):
    """Two 3x3 convolutions, each after its ReLU, around a residual. (B, H, W, C) -> the same."""

    def __init__(self, channels: int, **kw: Any):
        self.conv1 = Conv(channels, channels, **kw)
        self.conv2 = Conv(channels, channels, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.conv2(nnx.relu(self.conv1(nnx.relu(x))))


class Fusion(nnx.Module):
    """Adds a finer feature map to the coarser ones' sum and doubles its size. The coarsest is not added to anything.

    Call: x (B, H, W, C), finer (B, H, W, C) or None -> (B, 2 H, 2 W, C).
    """

    def __init__(self, channels: int, **kw: Any):
        # Every published file has `residual1` at the coarsest map too, where nothing reads it.
        self.residual1 = Residual(channels, **kw)
        self.residual2 = Residual(channels, **kw)
        self.projection = Linear(channels, channels, **kw)

    def __call__(self, x: jax.Array, finer: jax.Array | None = None) -> jax.Array:
        x = self.residual2(x if finer is None else x + self.residual1(finer))
        return self.projection(_double(x))


class DepthEstimator(nnx.Module):
    """Call: pixel values (B, H, W, 3) in -1..1 -> relative inverse depth (B, H, W) float32, >= 0; larger is nearer.

    H and W are multiples of 32, of any size; the estimator works best near `config.image_size`.

    Args:
        config: The architecture.
        dtype: Of computation.
        param_dtype: Of the parameters.
    """

    def __init__(
        self, config: DepthConfig, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        kw: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.dtype = dtype
        width, fusion = config.width, config.fusion_width
        self.stem = NormedConv(3, config.stem_width, 7, config.norm_groups, 2, **kw)
        stages, channels = [], config.stem_width
        for index, (out, depth) in enumerate(zip(config.stage_widths, config.stage_depths, strict=True)):
            blocks = []
            for block in range(depth):
                stride = 2 if index and not block else 1
                blocks.append(Bottleneck(channels, out, config.norm_groups, stride=stride, first=not block, **kw))
                channels = out
            stages.append(Stage(blocks))
        self.stages = nnx.List(stages)
        self.patch_projection = Linear(channels, width, **kw)
        self.class_token = nnx.Param(jnp.zeros((width,), param_dtype))
        positions = (config.image_size // PATCH) ** 2 + 1
        self.position_embedding = Embed(positions, width, **kw)
        self.layers = stack_layers(config, rngs, epsilon=config.norm_epsilon, dtype=dtype, param_dtype=param_dtype)
        # No output passes through the final norm. Files have it, so it is kept for the way back.
        self.final_norm = layer_norm(width, epsilon=config.norm_epsilon, **kw)
        self.readouts = nnx.List([Linear(2 * width, width, **kw) for _ in config.taps])
        self.reassemble = nnx.List([Linear(width, out, **kw) for out in config.reassemble_widths])
        coarsest = config.reassemble_widths[-1]
        self.reassemble_down = Conv(coarsest, coarsest, stride=2, **kw)
        maps = (*config.stage_widths[:2], *config.reassemble_widths)
        self.neck = nnx.List([Conv(channels, fusion, use_bias=False, **kw) for channels in maps])
        self.fusion = nnx.List([Fusion(fusion, **kw) for _ in maps])
        self.head_conv1 = Conv(fusion, fusion // 2, **kw)
        self.head_conv2 = Conv(fusion // 2, 32, **kw)
        self.head_out = Linear(32, 1, **kw)

    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        height, width = pixel_values.shape[1:3]
        if height % 32 or width % 32 or pixel_values.shape[3] != 3:
            raise ValueError(f"pixel_values has shape {pixel_values.shape}; want (B, H, W, 3), multiples of 32")
        x = nnx.relu(self.stem(pixel_values.astype(self.dtype)))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        maps = [*maps[:2], *self._transform(maps[-1])]
        maps = [conv(x) for conv, x in zip(self.neck, maps, strict=True)]
        x = self.fusion[0](maps[-1])
        for fusion, finer in zip(list(self.fusion)[1:], maps[-2::-1], strict=True):
            x = fusion(x, finer)
        x = nnx.relu(self.head_conv2(_double(self.head_conv1(x))))
        return nnx.relu(self.head_out(x))[..., 0].astype(jnp.float32)

    def _transform(self, features: jax.Array) -> list[jax.Array]:
        """features (B, h, w, C) -> the maps from the tapped layers' tokens: (B, h, w, C') and (B, h/2, w/2, C'')."""
        b, h, w, _ = features.shape
        tokens = self.patch_projection(features).reshape(b, h * w, -1)
        start = jnp.broadcast_to(self.class_token[...].astype(tokens.dtype), (b, 1, tokens.shape[-1]))
        x = jnp.concatenate([start, tokens], axis=1) + self._positions(h, w)
        middle = self.config.taps[0] + 1
        early = run_layers(self.layers, x, None, stop=middle)
        tapped = (early, run_layers(self.layers, early, None, start=middle))
        maps = []
        for x, readout, reassemble in zip(tapped, self.readouts, self.reassemble, strict=True):
            token = jnp.broadcast_to(x[:, :1], x[:, 1:].shape)
            x = gelu(readout(jnp.concatenate([x[:, 1:], token], axis=-1)))
            maps.append(reassemble(x).reshape(b, h, w, -1))
        return [maps[0], self.reassemble_down(maps[1])]

    def _positions(self, height: int, width: int) -> jax.Array:
        """The positions of a grid of this size, (1 + height * width, width of the transformer)."""
        embedding = self.position_embedding.embedding[...].astype(self.dtype)
        side = self.config.image_size // PATCH
        grid = embedding[1:].reshape(1, side, side, -1)
        if (height, width) != (side, side):
            grid = resize_bilinear(grid, height, width, align_corners=False)
        return jnp.concatenate([embedding[:1], grid.reshape(height * width, -1)])


def _double(x: jax.Array) -> jax.Array:
    return resize_bilinear(x, 2 * x.shape[1], 2 * x.shape[2], align_corners=True)
