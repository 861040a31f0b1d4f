"""The Pallas flash attention that JAX ships for TPUs, made to work under grad, vmap and on several devices."""

import jax
import jax.numpy as jnp

from unclip_jax.models.kernels import kernel_over_devices


def largest_block(length: int, most: int) -> int:
    """The largest multiple of 128 that divides a length, itself such a multiple, and is at most `most`."""
    return next(size for size in range(most, 0, -128) if length % size == 0)


def _kernel(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    # Imported here: half a second that only TPUs need to spend.
    from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, flash_attention

    # Each step of the grid costs a third of a microsecond beside its work: few and large ones, as far as VMEM goes.
    most = 1024 if q.shape[3] <= 128 else 256
    queries, keys = largest_block(q.shape[1], most), largest_block(k.shape[1], most)
    sub_queries, sub_keys = largest_block(queries, 512), largest_block(keys, 512)
    sizes = BlockSizes(
        block_b=1,
        block_q=queries,
        block_q_major_dkv=queries,
        block_q_dkv=sub_queries,
        block_q_dq=sub_queries,
        **dict.fromkeys(("block_k_major", "block_k_major_dkv", "block_k_major_dq"), keys),
        **dict.fromkeys(("block_k", "block_k_dkv", "block_k_dq"), sub_keys),
    )
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))  # (B, N, T, H)
    return jnp.swapaxes(flash_attention(q, k, v, sm_scale=q.shape[-1] ** -0.5, block_sizes=sizes), 1, 2)


# softmax(q k^T / sqrt(H)) v of q (B, T, N, H), k and v (B, S, N, H) -> (B, T, N, H), in float32 or bfloat16.
# T and S are multiples of 128, and so is H if it is larger than 128.
flash = kernel_over_devices(_kernel)
