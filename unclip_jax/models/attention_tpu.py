"""The Pallas flash attention that JAX ships for TPUs, made to work under grad, vmap and on several devices.

It has four layers, from the outside: the gradient, because the next two have no rule for it; vmap, which becomes a
larger batch; the partitioning over devices by batch and heads (`over_devices` does both), because the compiler does not
split a Pallas call by itself; and the kernel.
"""

import jax
import jax.numpy as jnp

from unclip_jax.models.partition import over_devices


@jax.custom_vjp
def flash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v.

    Args:
        q: (B, T, N, H). T is a multiple of 128, and so is H if it is larger than 128.
        k: (B, S, N, H). S is a multiple of 128.
        v: (B, S, N, H).

    Returns:
        (B, T, N, H).
    """
    return _forward(q, k, v)


def _save_inputs(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _forward(q, k, v), (q, k, v)


def _pull_back(inputs: tuple[jax.Array, ...], grad: jax.Array) -> tuple[jax.Array, ...]:
    return _backward(*inputs, grad)


def _kernel(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    # Imported here: half a second that only TPUs need to spend.
    from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, flash_attention

    def block(length: int) -> int:
        return next(size for size in (512, 256, 128) if length % size == 0)

    queries, keys = block(q.shape[1]), block(k.shape[1])
    sizes = BlockSizes(
        block_b=1,
        **dict.fromkeys(("block_q", "block_q_major_dkv", "block_q_dkv", "block_q_dq"), queries),
        **dict.fromkeys(("block_k_major", "block_k", "block_k_major_dkv", "block_k_dkv"), keys),
        **dict.fromkeys(("block_k_major_dq", "block_k_dq"), keys),
    )
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))  # (B, N, T, H)
    return jnp.swapaxes(flash_attention(q, k, v, sm_scale=q.shape[-1] ** -0.5, block_sizes=sizes), 1, 2)


def _kernel_gradient(q: jax.Array, k: jax.Array, v: jax.Array, grad: jax.Array) -> tuple[jax.Array, ...]:
    return jax.vjp(_kernel, q, k, v)[1](grad)


_forward = over_devices(_kernel, "b t n h, b s n h, b s n h -> b t n h")
_backward = over_devices(_kernel_gradient, "b t n h, b s n h, b s n h, b t n h -> b t n h, b s n h, b s n h")
flash.defvjp(_save_inputs, _pull_back)
