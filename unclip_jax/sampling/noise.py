"""Random numbers of an image, drawn by its own key: batch size, chunking and devices never change an image."""

from enum import IntEnum

import jax
import jax.numpy as jnp


class Branch(IntEnum):
    """The uses of random numbers. Each use folds its own number into the image's key."""

    IMAGE = 0  # noise on the image embedding; also folds in the image's index
    LATENTS = 1  # the initial latents
    STEP = 2  # noise of stochastic solvers; also folds in the index of the network evaluation
    POSTERIOR = 3  # sample of the VAE's posterior for a given image; also folds in the image's index
    LOW_RESOLUTION = 4  # noise on an upscaler's small image
    PRIOR = 8  # all noise of the prior: its start and its steps are branches of the keys that `branch` gives


def image_keys(seed: jax.Array | int, indices: jax.Array) -> jax.Array:
    """Makes one random key per image: fold_in(key(seed), index).

    Args:
        seed: An integer, () if traced; or (B,), one for each image.
        indices: (B,) int, the images' indices in the whole run.

    Returns:
        (B,) keys.
    """
    of_each = None if jnp.ndim(seed) == 0 else 0
    return jax.vmap(lambda seed, index: jax.random.fold_in(jax.random.key(seed), index), (of_each, 0))(seed, indices)


def branch(keys: jax.Array, name: Branch) -> jax.Array:
    """Derives the keys of a run within a run, whose random numbers repeat none of the outer run's.

    Args:
        keys: (B,) keys.
        name: The branch to derive.

    Returns:
        (B,) keys.
    """
    return jax.vmap(lambda key: jax.random.fold_in(key, int(name)))(keys)


def draw(keys: jax.Array, branch: Branch, shape: tuple[int, ...], number: jax.Array | int = 0) -> jax.Array:
    """Draws standard normal noise of `shape` for each of B keys.

    Args:
        keys: (B,) keys.
        branch: What the noise is for.
        shape: The shape of one image's noise.
        number: Distinguishes several draws of the same branch: the index of a network evaluation, or of an image.

    Returns:
        (B, *shape) float32.
    """

    def one(key: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, int(branch)), number), shape, jnp.float32)

    return jax.vmap(one)(keys)
