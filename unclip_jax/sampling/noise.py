"""Random numbers of an image: drawn by its own key, so that batch size, chunking and devices never change an image."""

from enum import IntEnum

import jax
import jax.numpy as jnp


class Branch(IntEnum):
    """What a draw is for. Each use folds its own number into the image's key."""

    IMAGE = 0  # noise on the image embedding; folds in the image's number, too
    LATENTS = 1  # where the sampling starts
    STEP = 2  # noise of stochastic solvers; folds in the network call's number, too
    POSTERIOR = 3  # of the VAE's encoding of a given image; folds in the image's number, too
    LOW_RESOLUTION = 4  # on the small image of an upscaler
    PRIOR = 8  # whatever the prior draws: its start and steps are branches of the keys that `branch` gives


def image_keys(seed: jax.Array | int, indices: jax.Array) -> jax.Array:
    """One key an image: fold_in(key(seed), index). indices: (B,) int -> (B,) keys."""
    root = jax.random.key(seed)
    return jax.vmap(lambda index: jax.random.fold_in(root, index))(indices)


def branch(keys: jax.Array, name: Branch) -> jax.Array:
    """Keys of a run within a run, whose own branches then repeat no number of the outer one's. keys: (B,) -> (B,)."""
    return jax.vmap(lambda key: jax.random.fold_in(key, int(name)))(keys)


def draw(keys: jax.Array, branch: Branch, shape: tuple[int, ...], number: jax.Array | int = 0) -> jax.Array:
    """Standard normal noise of `shape` for each of B keys: (B, *shape) float32.

    number: which of several draws of the same branch (a network call, an image).
    """

    def one(key: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, int(branch)), number), shape, jnp.float32)

    return jax.vmap(one)(keys)
