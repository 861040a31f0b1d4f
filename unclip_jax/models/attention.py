"""The library's one entry point for attention."""

import jax
import jax.numpy as jnp


def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Multi-head attention. q: (B, T, N, H), k and v: (B, S, N, H), bias: broadcastable to (B, N, T, S) -> (B, T, N, H).

    Logits are scaled by H**-0.5; logits and softmax are float32, the result has q's dtype.
    """
    if q.shape[1] > 1024 and bias is None and q.shape[1] % 512 == 0:
        blocks = jnp.moveaxis(q.reshape(q.shape[0], -1, 512, *q.shape[2:]), 1, 0)
        out = jax.lax.map(jax.checkpoint(lambda block: _plain(block, k, v, None)), blocks)
        return jnp.moveaxis(out, 0, 1).reshape(q.shape)
    return _plain(q, k, v, bias)


def _plain(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    logits = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(logits if bias is None else logits + bias, axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights.astype(v.dtype), v).astype(q.dtype)
