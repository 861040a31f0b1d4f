"""The denoising UNet of the Stable Diffusion 2 family (Rombach et al. 2022, arXiv:2112.10752).

Four levels of residual blocks and text-conditioned transformers, each level half the size of the one above. One class
serves every published checkpoint: 4, 5, 7 or 9 input channels; class conditioning by a projected vector (unCLIP), by a
table (the x4 upscaler) or none; and transformers whose first attention also reads the text (the upscaler).

What a sampling loop needs only once is its own method: `embed_time`, `embed_class`, `encode_context`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from unclip_jax.models.attention import attend
from unclip_jax.models.configs import UNetConfig
from unclip_jax.models.freeu import FreeU, reweight
from unclip_jax.models.layers import (
    Conv,
    Embed,
    GroupNorm,
    Linear,
    ResnetBlock,
    gelu,
    layer_norm,
)
from unclip_jax.models.partition import mesh_of
from unclip_jax.models.timestep import timestep_embedding
from unclip_jax.models.upsampling import upsample_and_convolve

KeyValue = tuple[jax.Array, jax.Array]  # each (B, S, N, H)
TextKeyValues = list[tuple[KeyValue | None, KeyValue]]  # one entry a transformer: its first and second attention


class Attention(nnx.Module):
    """Multi-head attention of image tokens over a context.

    Call: x (B, T, dim) and the context's keys and values from `encode` -> (B, T, dim). In rows where `perturbed`, (B,)
    bool, is true, every token keeps its own value: the attention map is the identity (arXiv:2403.17377).
    """

    def __init__(self, dim: int, context_dim: int, heads: int, chunk: int | None, **kw: Any):
        self.heads = heads
        self.chunk = chunk
        self.to_q = Linear(dim, dim, use_bias=False, **kw)
        self.to_k = Linear(context_dim, dim, use_bias=False, **kw)
        self.to_v = Linear(context_dim, dim, use_bias=False, **kw)
        self.to_out = Linear(dim, dim, **kw)

    def encode(self, context: jax.Array) -> KeyValue:
        """context: (B, S, context_dim) -> keys and values, each (B, S, N, H)."""
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def __call__(self, x: jax.Array, key_value: KeyValue, perturbed: jax.Array | None = None) -> jax.Array:
        out = attend(self._split(self.to_q(x)), *key_value, chunk=self.chunk)  # (B, T, N, H)
        if perturbed is not None:
            out = jnp.where(perturbed[:, None, None, None], key_value[1], out)
        return self.to_out(out.reshape(x.shape))

    def _split(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.heads, -1)


class FeedForward(nnx.Module):
    """GEGLU (Shazeer 2020, arXiv:2002.05202) with the exact GELU. Call: (B, T, dim) -> (B, T, dim)."""

    def __init__(self, dim: int, **kw: Any):
        self.proj_in = Linear(dim, 8 * dim, **kw)
        self.proj_out = Linear(4 * dim, dim, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        # Split over "model", the two halves of one product would be on other devices than the rows of proj_out's
        # kernel. Alone, two products would copy the kernel's halves.
        split_weights = mesh_of(x).shape.get("model", 1) > 1
        value, gate = self.proj_in.halves(x) if split_weights else jnp.split(self.proj_in(x), 2, axis=-1)
        return self.proj_out(value * gelu(gate))


class Transformer(nnx.Module):
    """One transformer block over the pixels of a feature map, with the residual around it.

    Call: x (B, H, W, dim) and the text's keys and values from `encode_context` -> (B, H, W, dim). With
    `only_cross_attention` both attentions read the text. `perturbed`: of the self-attention, see `Attention`.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        heads: int,
        groups: int,
        only_cross_attention: bool,
        chunk: int | None,
        **kw: Any,
    ):
        self.only_cross_attention = only_cross_attention
        self.norm = GroupNorm(dim, groups, epsilon=1e-6, param_dtype=kw["param_dtype"])
        self.proj_in = Linear(dim, dim, **kw)
        self.norm1 = layer_norm(dim, **kw)
        self.attn1 = Attention(dim, context_dim if only_cross_attention else dim, heads, chunk, **kw)
        self.norm2 = layer_norm(dim, **kw)
        self.attn2 = Attention(dim, context_dim, heads, chunk, **kw)
        self.norm3 = layer_norm(dim, **kw)
        self.ff = FeedForward(dim, **kw)
        self.proj_out = Linear(dim, dim, **kw)

    def encode_context(self, context: jax.Array) -> tuple[KeyValue | None, KeyValue]:
        first = self.attn1.encode(context) if self.only_cross_attention else None
        return first, self.attn2.encode(context)

    def __call__(
        self, x: jax.Array, text: tuple[KeyValue | None, KeyValue], perturbed: jax.Array | None = None
    ) -> jax.Array:
        h = self.proj_in(self.norm(x).reshape(x.shape[0], -1, x.shape[-1]))  # (B, T, C)
        normed = self.norm1(h)
        h = h + self.attn1(normed, self.attn1.encode(normed) if text[0] is None else text[0], perturbed)
        h = h + self.attn2(self.norm2(h), text[1])
        h = h + self.ff(self.norm3(h))
        return x + self.proj_out(h).reshape(x.shape)


class Block(nnx.Module):
    """One level of the down path, the middle, or one level of the up path: resnets, each followed by a transformer.

    `resample` is the convolution to the next level, or None; the caller applies it, since down and up differ.
    """

    def __init__(self, resnets: list[ResnetBlock], attentions: list[Transformer], resample: Conv | None):
        self.resnets = nnx.List(resnets)
        self.attentions = nnx.List(attentions)
        self.resample = resample


class TimestepMLP(nnx.Module):
    """Linear, SiLU, Linear: (B, in_features) -> (B, time_channels)."""

    def __init__(self, in_features: int, time_channels: int, **kw: Any):
        self.linear_1 = Linear(in_features, time_channels, **kw)
        self.linear_2 = Linear(time_channels, time_channels, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_2(nnx.silu(self.linear_1(x)))


class UNet(nnx.Module):
    """The denoiser. Call: latents, timesteps, text and class conditioning -> the model's prediction.

    The call takes x (B, H, W, in_channels), with H and W multiples of `config.size_multiple`; timesteps (B,) in [0,
    1000), fractions allowed; context (B, S, cross_attention_dim), the text encoder's hidden states; and class_labels:
    (B, class_embedding_size) float for "projection", (B,) int for "table", or None. It returns (B, H, W, out_channels)
    in the compute dtype: epsilon, v or x0, as the checkpoint was trained.

    Args:
        config: The architecture.
        dtype: The dtype of computation.
        param_dtype: The dtype of storage.
        remat: Recompute each resnet and transformer in the backward pass instead of keeping its activations.
        attention_chunk: The number of queries that attention takes at a time; None leaves that to the platform.
        rngs: The random keys for the parameters.
    """

    def __init__(
        self,
        config: UNetConfig,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        remat: bool = False,
        attention_chunk: int | None = None,
        rngs: nnx.Rngs,
    ):
        kw: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.dtype = dtype
        self.remat = remat
        channels, last = config.block_out_channels, len(config.block_out_channels) - 1

        def resnet(in_channels: int, out_channels: int) -> ResnetBlock:
            return ResnetBlock(
                in_channels,
                out_channels,
                groups=config.norm_groups,
                epsilon=1e-5,
                time_channels=config.time_channels,
                **kw,
            )

        def transformers(level: int, count: int) -> list[Transformer]:
            return [
                Transformer(
                    channels[level],
                    config.cross_attention_dim,
                    config.num_heads[level],
                    config.norm_groups,
                    config.only_cross_attention[level],
                    attention_chunk,
                    **kw,
                )
                for _ in range(count if config.attention_levels[level] else 0)
            ]

        self.time_embedding = TimestepMLP(channels[0], config.time_channels, **kw)
        self.class_embedding = _class_embedding(config, **kw)

        self.conv_in = Conv(config.in_channels, channels[0], **kw)
        skips = [channels[0]]
        down, width = [], channels[0]
        for level, out in enumerate(channels):
            resnets = []
            for _ in range(config.layers_per_block):
                resnets.append(resnet(width, out))
                width = out
                skips.append(width)
            # Symmetric padding, unlike the VAE's: the original's UNet pads all four sides by one.
            resample = Conv(width, width, stride=2, padding=((1, 1), (1, 1)), **kw) if level < last else None
            if resample is not None:
                skips.append(width)
            down.append(Block(resnets, transformers(level, len(resnets)), resample))
        self.down_blocks = nnx.List(down)

        # The middle always has self-attention, even if the level above it only reads the text.
        middle = Transformer(
            width, config.cross_attention_dim, config.num_heads[-1], config.norm_groups, False, attention_chunk, **kw
        )
        self.mid_block = Block([resnet(width, width), resnet(width, width)], [middle], None)

        up = []
        for level, out in reversed(list(enumerate(channels))):
            resnets = []
            for _ in range(config.layers_per_block + 1):
                resnets.append(resnet(width + skips.pop(), out))
                width = out
            resample = Conv(width, width, **kw) if level > 0 else None
            up.append(Block(resnets, transformers(level, len(resnets)), resample))
        self.up_blocks = nnx.List(up)

        self.conv_norm_out = GroupNorm(width, config.norm_groups, epsilon=1e-5, param_dtype=param_dtype)
        self.conv_out = Conv(width, config.out_channels, **kw)

    def embed_time(self, timesteps: jax.Array) -> jax.Array:
        """timesteps: (B,) -> (B, time_channels)."""
        return self.time_embedding(timestep_embedding(timesteps, self.config.block_out_channels[0]).astype(self.dtype))

    def embed_class(self, class_labels: jax.Array) -> jax.Array:
        """Embeds class labels, to be added to the time embedding.

        Args:
            class_labels: (B, class_embedding_size) or (B,) int.

        Returns:
            (B, time_channels).

        Raises:
            ValueError: The network has no class conditioning.
        """
        if self.class_embedding is None:
            raise ValueError("class_labels is given; want None for a UNet without class conditioning")
        if self.config.class_embedding == "projection":
            class_labels = class_labels.astype(self.dtype)
        return self.class_embedding(class_labels)

    def encode_context(self, context: jax.Array) -> TextKeyValues:
        """context: (B, S, cross_attention_dim) -> every transformer's keys and values of the text, in call order."""
        return [transformer.encode_context(context.astype(self.dtype)) for transformer in self._transformers()]

    def perturb_attention(self, rows: jax.Array, layers: Sequence[str] = ("mid",)) -> list[jax.Array | None]:
        """Makes the argument `perturbed` of `denoise`.

        Args:
            rows: (B,) bool, which rows of the batch are perturbed.
            layers: Whose self-attention is perturbed: "mid", or layers on the way "down" or "up", with blocks numbered
                in call order. "down.1" is all of a block's transformers, "down.1.0" its first.

        Returns:
            One entry per transformer, in call order.

        Raises:
            ValueError: A layer has no self-attention.
        """
        names: list[str | None] = []
        for way, blocks in (("down", self.down_blocks), ("mid", [self.mid_block]), ("up", self.up_blocks)):
            for number, block in enumerate(blocks):
                start = way if way == "mid" else f"{way}.{number}"
                names += [None if t.only_cross_attention else f"{start}.{n}" for n, t in enumerate(block.attentions)]
        chosen = {layer: [f"{name}.".startswith(f"{layer}.") for name in names] for layer in layers}
        for layer, where in chosen.items():
            if not any(where):
                accepted = ", ".join(name for name in names if name is not None)
                raise ValueError(f"perturbed layer {layer!r} has no self-attention; accepted: {accepted}")
        return [rows if any(column) else None for column in zip(*chosen.values(), strict=True)]

    def denoise(
        self,
        x: jax.Array,
        emb: jax.Array,
        text: TextKeyValues,
        perturbed: Sequence[jax.Array | None] | None = None,
        freeu: FreeU | None = None,
    ) -> jax.Array:
        """The part that every step repeats.

        Args:
            x: (B, H, W, in_channels).
            emb: (B, time_channels), the sum of the time and class embeddings.
            text: From `encode_context`.
            perturbed: From `perturb_attention`: which rows lose their self-attention in which layers.
            freeu: Reweights the up path; None leaves it as trained.

        Returns:
            (B, H, W, out_channels), the prediction.
        """
        texts = iter(zip(text, perturbed or [None] * len(text), strict=True))
        run = nnx.remat(_apply) if self.remat else _apply

        def layer(block: Block, index: int, x: jax.Array) -> jax.Array:
            x = run(block.resnets[index], x, emb)
            return run(block.attentions[index], x, *next(texts)) if index < len(block.attentions) else x

        x = self.conv_in(x.astype(self.dtype))
        skips = [x]
        for block in self.down_blocks:
            for index in range(len(block.resnets)):
                x = layer(block, index, x)
                skips.append(x)
            if block.resample is not None:
                x = block.resample(x)
                skips.append(x)
        for index in range(2):
            x = layer(self.mid_block, index, x)
        for level, block in enumerate(self.up_blocks):
            for index in range(len(block.resnets)):
                skip = skips.pop()
                if freeu is not None:
                    x, skip = reweight(x, skip, level, freeu)
                x = layer(block, index, jnp.concatenate([x, skip], axis=-1))
            if block.resample is not None:
                x = upsample_and_convolve(block.resample, x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))

    def __call__(
        self, x: jax.Array, timesteps: jax.Array, context: jax.Array, class_labels: jax.Array | None = None
    ) -> jax.Array:
        multiple = self.config.size_multiple
        if x.ndim != 4 or x.shape[1] % multiple or x.shape[2] % multiple or x.shape[3] != self.config.in_channels:
            raise ValueError(
                f"x has shape {x.shape}; want (B, H, W, {self.config.in_channels}), H and W multiples of {multiple}"
            )
        if (class_labels is None) != (self.class_embedding is None):
            raise ValueError(f"class_labels is {'None; want labels' if class_labels is None else 'given; want None'}")
        emb = self.embed_time(timesteps)
        if class_labels is not None:
            emb = emb + self.embed_class(class_labels)
        return self.denoise(x, emb, self.encode_context(context))

    def _transformers(self) -> Iterator[Transformer]:
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            yield from block.attentions


def _class_embedding(config: UNetConfig, **kw: Any) -> TimestepMLP | Embed | None:
    if config.class_embedding_size is None:
        return None
    kind = TimestepMLP if config.class_embedding == "projection" else Embed
    return kind(config.class_embedding_size, config.time_channels, **kw)


def _apply(module: nnx.Module, x: jax.Array, *conditions: Any) -> jax.Array:
    return module(x, *conditions)
