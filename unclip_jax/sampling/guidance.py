"""Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) as one doubled batch."""

import jax
import jax.numpy as jnp


def interleave(unconditional: jax.Array, conditional: jax.Array) -> jax.Array:
    """(B, ...) twice -> (2 B, ...): image i's unconditional row is 2 i, its conditional one 2 i + 1.

    Neighbours rather than halves: with the batch split over devices, both rows of an image stay on one.
    """
    pairs = jnp.stack([unconditional, conditional], axis=1)
    return pairs.reshape(-1, *pairs.shape[2:])


def double(x: jax.Array) -> jax.Array:
    """(B, ...) -> (2 B, ...): every image's row twice, as `interleave` orders them."""
    return interleave(x, x)


def guide(out: jax.Array, scale: jax.Array) -> jax.Array:
    """Extrapolates from the unconditional to the conditional prediction: u + scale (c - u).

    out: (2 B, ...) as `interleave` orders it; scale: () or (B,). Returns (B, ...) float32.
    """
    pairs = out.astype(jnp.float32).reshape(-1, 2, *out.shape[1:])
    unconditional, conditional = pairs[:, 0], pairs[:, 1]
    scale = jnp.reshape(scale, (-1,) + (1,) * (conditional.ndim - 1))
    return unconditional + scale * (conditional - unconditional)
