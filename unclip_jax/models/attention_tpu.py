"""The Pallas flash attention that JAX ships for TPUs, made to work under grad, vmap and on several devices."""

import jax
import jax.numpy as jnp

from unclip_jax.models.kernels import kernel_over_devices


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


# softmax(q k^T / sqrt(H)) v of q (B, T, N, H), k and v (B, S, N, H) -> (B, T, N, H), in float32 or bfloat16.
# T and S are multiples of 128, and so is H if it is larger than 128.
flash = kernel_over_devices(_kernel)
