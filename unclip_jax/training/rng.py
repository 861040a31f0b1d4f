"""The random numbers of a training step, drawn for each image by its own key, whatever its batch or device."""

from enum import IntEnum
from typing import NamedTuple

import jax


class _Purpose(IntEnum):
    """The uses of random numbers; each folds its own number into the image's key."""

    TIMESTEP = 0
    NOISE = 1
    OFFSET = 2
    LEVEL = 3
    EMBEDDING = 4
    KEEP_IMAGE = 5
    KEEP_TEXT = 6
    POSTERIOR = 7
    MASKED = 8
    LOW_RES = 9


class Draws(NamedTuple):
    """One step's random numbers for B images.

    Attributes:
        timesteps: (B,) int32 in [0, N).
        noise: (B, h, w, C), of the diffusion.
        posterior_noise: (B, h, w, C), for sampling latents from the VAE's posterior.
        masked_noise: The same, for the image without what an inpainting model repaints.
        low_res_noise: (B, h, w, 3), for an upscaler's small image.
        offset: (B, C), see `unclip_jax.training.objectives.offset_noise`.
        levels: (B,) int32 in [0, N'), of the image embedding.
        embedding_noise: (B, D), of the image embedding.
        keep_image: (B,) bool, False if the image condition is dropped.
        keep_text: (B,) bool, False if the text is dropped.
        keep_original: (B,) bool, False if the image that an instruction changes is dropped: for as many images as lose
            the text, half of which lose both. Source: section 3.2.1 of arXiv:2211.09800, with a share of 10 %.
    """

    timesteps: jax.Array
    noise: jax.Array
    posterior_noise: jax.Array
    masked_noise: jax.Array
    low_res_noise: jax.Array
    offset: jax.Array
    levels: jax.Array
    embedding_noise: jax.Array
    keep_image: jax.Array
    keep_text: jax.Array
    keep_original: jax.Array


def step_keys(seed: jax.Array | int, step: jax.Array | int, indices: jax.Array) -> jax.Array:
    """One key per image for a step: fold_in(fold_in(key(seed), step), index).

    Args:
        seed: The run's seed.
        step: The step's number.
        indices: (B,) int, positions in the batch of all devices together.

    Returns:
        (B,) keys.
    """
    root = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda index: jax.random.fold_in(root, index))(indices)


def draw_step(
    keys: jax.Array,
    latent_shape: tuple[int, int, int],
    embedding_width: int = 0,
    *,
    train_timesteps: int = 1000,
    noise_levels: int = 1000,
    embedding_dropout: float = 0.25,
    text_dropout: float = 0.0,
) -> Draws:
    """Everything random in a denoising step, for B keys.

    Args:
        keys: (B,) keys.
        latent_shape: (h, w, C).
        embedding_width: D; 0 without image conditioning.
        train_timesteps: N.
        noise_levels: N'.
        embedding_dropout: The share in [0, 1] of images that lose their whole image condition; 0.25 in the original.
        text_dropout: The share in [0, 1] of images that lose their text.

    Returns:
        The random numbers.

    Raises:
        ValueError: A share is out of range.
    """
    for name, share in (("embedding_dropout", embedding_dropout), ("text_dropout", text_dropout)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is {share}; want a share between 0 and 1")

    def one(key: jax.Array) -> Draws:
        use = {kind: jax.random.fold_in(key, int(kind)) for kind in _Purpose}
        place = jax.random.uniform(use[_Purpose.KEEP_TEXT])
        return Draws(
            timesteps=jax.random.randint(use[_Purpose.TIMESTEP], (), 0, train_timesteps),
            noise=jax.random.normal(use[_Purpose.NOISE], latent_shape),
            posterior_noise=jax.random.normal(use[_Purpose.POSTERIOR], latent_shape),
            masked_noise=jax.random.normal(use[_Purpose.MASKED], latent_shape),
            low_res_noise=jax.random.normal(use[_Purpose.LOW_RES], (*latent_shape[:2], 3)),
            offset=jax.random.normal(use[_Purpose.OFFSET], latent_shape[-1:]),
            levels=jax.random.randint(use[_Purpose.LEVEL], (), 0, noise_levels),
            embedding_noise=jax.random.normal(use[_Purpose.EMBEDDING], (embedding_width,)),
            keep_image=jax.random.bernoulli(use[_Purpose.KEEP_IMAGE], 1 - embedding_dropout),
            keep_text=place < 1 - text_dropout,
            keep_original=(place < 1 - 1.5 * text_dropout) | (place >= 1 - 0.5 * text_dropout),
        )

    return jax.vmap(one)(keys)
