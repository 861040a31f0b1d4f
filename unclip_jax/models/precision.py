"""The precision of matrix products: float32 means float32, also on devices that would rather round to fewer bits."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def precision_of(dtype: DTypeLike) -> jax.lax.Precision | None:
    """What a product of two arrays of this dtype is to be given as its `precision`.

    JAX's own choice for float32 is bfloat16 on TPUs and TF32 on newer GPUs. It is kept where the user has made it:
    by `jax.config.update("jax_default_matmul_precision", ...)` or within `jax.default_matmul_precision(...)`.

    Args:
        dtype: Of the arrays.

    Returns:
        HIGHEST in float32, unless the user has chosen; None, JAX's own choice, otherwise.
    """
    return jax.lax.Precision.HIGHEST if chosen_precision() is None and jnp.dtype(dtype) == jnp.float32 else None


def chosen_precision() -> str | None:
    """JAX's setting `jax_default_matmul_precision`, as it holds here; None where nobody has made it."""
    chosen: str | None = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]  # made at run time
    return chosen
