"""The library's one entry point for attention, and its implementations.

The implementation is a function of the platform and of static shapes, `attention_kernel`:

- "cudnn": NVIDIA's flash attention, for half precision and heads of at most 128, on Ampere and newer;
- "flash": the Pallas kernel for TPUs, v4 and newer, for lengths that fill its blocks, not in float16;
- "heads": long sequences on a CPU, one head and one block of queries at a time, so that a block's logits stay in cache
  (0.25 s against 0.75 s for the plain form at 4096 tokens, 10 heads of 64, on 2 cores);
- "queries": long sequences on an accelerator whose flash kernel does not take them (the VAE's head of 512): all heads,
  one block of queries at a time, to bound memory;
- "plain": everything at once, and the only one that takes a bias.

Where the environment variable UNCLIP_JAX_PLAIN_ATTENTION is set, nothing takes "cudnn" or "flash": a way out where an
installation of cuDNN is broken, and the one to forward-mode derivatives, which those do not have.

All of them keep the queries, keys and values for the backward pass and recompute the rest, so that training memory
grows with the number of tokens, not with its square.
"""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp

from unclip_jax.models.attention_tpu import flash
from unclip_jax.models.kernels import kernel_over_devices
from unclip_jax.models.partition import folding_vmap, over_devices
from unclip_jax.models.platform import Implementation, by_platform
from unclip_jax.models.precision import precision_of

# The plain form's largest product of lengths on a CPU, whose caches one head's logits are to fit, and elsewhere its
# largest number of logits, which are 1 GiB.
_PLAIN_LENGTHS_CPU = 2**19
_PLAIN_LOGITS = 2**28
# Floats of logits in a block of queries, and the fewest queries that are worth a block.
_HEADS_BLOCK = 2**22
_QUERIES_BLOCK = 2**26
_QUERIES_ROWS = 128


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None, *, chunk: int | None = None
) -> jax.Array:
    """Multi-head attention, softmax(q k^T / sqrt(H) + bias) v for each head.

    Logits and softmax are float32 whatever the dtype of q.

    Args:
        q: (B, T, N, H).
        k: (B, S, N, H).
        v: (B, S, N, H).
        bias: float32, broadcastable to (B, N, T, S), with -inf where a query must not attend (it must somewhere).
        chunk: The number of queries at a time, to bound memory, instead of the platform's own way. A bias is not split.

    Returns:
        (B, T, N, H) in q's dtype.
    """
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    if bias is not None:
        return _plain(q, k, v, bias)
    if chunk is not None:
        return _swap(_in_blocks(_swap(q), _swap(k), _swap(v), chunk))

    def choose(platform: str) -> Implementation:
        return _KERNELS[attention_kernel(platform, q.dtype, q.shape, k.shape[1], False)]

    return by_platform(choose, q, k, v)


def attention_kernel(
    platform: str, dtype: Any, shape: tuple[int, ...], context_tokens: int, has_bias: bool = False
) -> str:
    """The implementation that `attend` takes: "plain", "heads", "queries", "cudnn" or "flash".

    Args:
        platform: See `unclip_jax.models.platform.platform_of`.
        dtype: Of q, k and v.
        shape: Of q, (B, T, N, H).
        context_tokens: S.
        has_bias: Whether there is a bias.

    Returns:
        The implementation's name.
    """
    if has_bias:
        return "plain"
    batch, tokens, heads, head_dim = shape
    if platform == "cpu":
        return "plain" if tokens * context_tokens <= _PLAIN_LENGTHS_CPU else "heads"
    fused = os.environ.get("UNCLIP_JAX_PLAIN_ATTENTION", "0") in ("", "0")
    if fused and platform == "gpu" and jnp.dtype(dtype) != jnp.float32 and head_dim <= 128 and head_dim % 8 == 0:
        return "cudnn"
    whole_blocks = tokens % 128 == 0 and context_tokens % 128 == 0 and (head_dim <= 128 or head_dim % 128 == 0)
    if fused and platform == "tpu" and jnp.dtype(dtype) != jnp.float16 and whole_blocks:
        return "flash"
    return "plain" if batch * heads * tokens * context_tokens <= _PLAIN_LOGITS else "queries"


def _plain(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    return _swap(_softmax_product(_swap(q), _swap(k), _swap(v), bias))


def _queries(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    rows = _QUERIES_BLOCK // (q.shape[0] * q.shape[2] * k.shape[1])
    return _swap(_in_blocks(_swap(q), _swap(k), _swap(v), max(rows, _QUERIES_ROWS)))


def _each_head(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    heads = [_swap(a).reshape(-1, a.shape[1], a.shape[3]) for a in (q, k, v)]  # (B N, T or S, H)
    rows = _HEADS_BLOCK // k.shape[1]
    out = jax.lax.map(lambda head: _in_blocks(head[0], head[1], head[2], rows), heads)
    return _swap(out.reshape(q.shape[0], q.shape[2], q.shape[1], q.shape[3]))


# The loop is over images as well, and the compiler would first gather those of other devices.
_split_heads = over_devices(_each_head, "b t n h, b s n h, b s n h -> b t n h")
_folded_heads = folding_vmap(_split_heads)


@jax.custom_jvp
def _heads(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return _folded_heads(q, k, v)


@_heads.defjvp
def _move_heads(inputs: tuple[jax.Array, ...], changes: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    return _heads(*inputs), jax.jvp(_split_heads, inputs, changes)[1]


def _cudnn_kernel(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, implementation="cudnn")


def _differentiated(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    # JAX 0.10.1 takes every attention for one with a bias, and refuses the gradient of odd lengths: 77 words.
    odd = q.shape[1] % 2 or k.shape[1] % 2
    return _queries(q, k, v) if odd else _cudnn_kernel(q, k, v)


_cudnn = kernel_over_devices(_cudnn_kernel, _differentiated)


def _swap(x: jax.Array) -> jax.Array:
    """(B, T, N, H) <-> (B, N, T, H)."""
    return jnp.swapaxes(x, 1, 2)


@jax.checkpoint
def _softmax_product(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """q: (..., T, H), k and v: (..., S, H), bias: (..., T, S) -> (..., T, H)."""
    scale = q.shape[-1] ** -0.5
    if q.dtype == jnp.float32:  # half precision would round the scaled queries
        q, scale = q * scale, 1.0  # there are fewer of them than of logits
    product = functools.partial(jnp.einsum, precision=precision_of(q.dtype), preferred_element_type=jnp.float32)
    logits = product("...th,...sh->...ts", q, k) * scale
    if bias is not None:
        logits = logits + bias
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    if q.dtype == jnp.float32:
        # Divided after the product: there are fewer outputs than weights.
        return product("...ts,...sh->...th", weights, v) / total
    # Before: on TPUs that joins the weights' rounding, and the outputs need no sums of another shape (a third less time
    # over the 77 words of a text, by the compiler's estimate for a v5e).
    return product("...ts,...sh->...th", (weights / total).astype(v.dtype), v).astype(q.dtype)


def _in_blocks(q: jax.Array, k: jax.Array, v: jax.Array, rows: int) -> jax.Array:
    """`_softmax_product` over equal blocks of at most `rows` queries. Shapes as there."""
    *leading, tokens, head_dim = q.shape
    blocks = -(-tokens // max(1, rows))
    rows = -(-tokens // blocks)
    padded = jnp.pad(q, [(0, 0)] * len(leading) + [(0, rows * blocks - tokens), (0, 0)])
    split = jnp.moveaxis(padded.reshape(*leading, blocks, rows, head_dim), -3, 0)
    out = jax.lax.map(lambda part: _softmax_product(part, k, v), split)
    return jnp.moveaxis(out, 0, -3).reshape(padded.shape)[..., :tokens, :]


_KERNELS: dict[str, Implementation] = {
    "plain": _plain,
    "heads": _heads,
    "queries": _queries,
    "cudnn": _cudnn,
    "flash": flash,
}
