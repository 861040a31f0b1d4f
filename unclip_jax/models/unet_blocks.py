"""The blocks of the UNet and of what shares its encoder: transformers over the pixels of a feature map, and a level."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from unclip_jax.models.attention import attend
from unclip_jax.models.layers import Conv, GroupNorm, Linear, ResnetBlock, gelu, layer_norm
from unclip_jax.models.partition import mesh_of

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
