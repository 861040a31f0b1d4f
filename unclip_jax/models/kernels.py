"""What an accelerator's attention kernel needs around it: a gradient, vmap, several devices, and its own precision."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from unclip_jax.models.partition import folding_vmap, over_devices
from unclip_jax.models.precision import chosen_precision

# What users may ask of JAX for float32 products that is one pass in bfloat16.
_ONE_PASS = ("default", "fastest", "bfloat16")


def kernel_over_devices(kernel: Any, differentiated: Any = None) -> Any:
    """Makes of one device's attention kernel one that works under grad, vmap and on several devices.

    It has four layers, from the outside: the gradient, because the next two have no rule for it; vmap, which becomes a
    larger batch; the devices, because the compiler does not split a kernel by itself; and the kernel. It has no
    forward-mode derivative. Only q, k and v are kept for the gradient.

    Args:
        kernel: q (B, T, N, H), k and v (B, S, N, H) -> (B, T, N, H).
        differentiated: The same function, whose gradient is taken; None: the kernel's.

    Returns:
        The function of the same arrays.
    """

    def value(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        with jax.default_matmul_precision(_precision(q.dtype)):
            return kernel(q, k, v)

    def gradient(q: jax.Array, k: jax.Array, v: jax.Array, grad: jax.Array) -> tuple[jax.Array, ...]:
        with jax.default_matmul_precision(_precision(q.dtype)):
            return jax.vjp(differentiated or kernel, q, k, v)[1](grad)

    forward = folding_vmap(over_devices(value, "b t n h, b s n h, b s n h -> b t n h"))
    backward = folding_vmap(over_devices(gradient, "b t n h, b s n h, b s n h, b t n h -> b t n h, b s n h, b s n h"))

    @jax.custom_vjp
    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return forward(q, k, v)

    attention.defvjp(lambda *inputs: (forward(*inputs), inputs), lambda inputs, grad: backward(*inputs, grad))
    return attention


def _precision(dtype: DTypeLike) -> str:
    """Of the products inside: Mosaic has exact ones of float32 alone, and else one pass in bfloat16."""
    return "default" if jnp.dtype(dtype) != jnp.float32 or chosen_precision() in _ONE_PASS else "highest"
