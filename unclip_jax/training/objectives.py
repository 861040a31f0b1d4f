"""Training losses of a denoiser: pure functions of explicit arrays, with every random number an argument.

Written with a = alphas_cumprod[t] and the signal-to-noise ratio a / (1 - a).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from unclip_jax.conditioning.noise_augmentation import noise_image_embeddings
from unclip_jax.sampling.schedule import PREDICTION_TYPES, add_noise

# (noisy latents with any added channels, timesteps, text states, class labels) -> prediction: a `UNet` is one.
Denoiser = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]


def prediction_target(prediction_type: str, x0: jax.Array, noise: jax.Array, alpha_cumprod: jax.Array) -> jax.Array:
    """What a network of this prediction type should predict for `add_noise(x0, noise, alpha_cumprod)`.

    Args:
        prediction_type: "epsilon", "v_prediction" or "sample".
        x0: (B, ...).
        noise: (B, ...).
        alpha_cumprod: (B,).

    Returns:
        (B, ...) float32: the noise for "epsilon"; sqrt(a) noise - sqrt(1 - a) x0 for "v_prediction" (Salimans & Ho
        2022, arXiv:2202.00512); x0 for "sample".

    Raises:
        ValueError: The prediction type is unknown.
    """
    if prediction_type == "epsilon":
        return noise.astype(jnp.float32)
    if prediction_type == "v_prediction":
        return add_noise(noise, -x0, alpha_cumprod)
    if prediction_type == "sample":
        return x0.astype(jnp.float32)
    raise ValueError(f"prediction_type is {prediction_type!r}; accepted: {', '.join(PREDICTION_TYPES)}")


def min_snr_weights(prediction_type: str, alpha_cumprod: jax.Array, gamma: float = 5.0) -> jax.Array:
    """Weights that keep easy timesteps from dominating the loss (Hang et al. 2023, arXiv:2303.09556).

    They are min(SNR, gamma) times the factor that converts this prediction's error to one of x0.

    Args:
        prediction_type: As in `prediction_target`.
        alpha_cumprod: (B,), in [0, 1).
        gamma: Above 0; 5 in the paper.

    Returns:
        (B,) float32.

    Raises:
        ValueError: The prediction type is unknown, or gamma is not positive.
    """
    if not gamma > 0:
        raise ValueError(f"min_snr_gamma is {gamma}; want a positive number")
    share = alpha_cumprod.astype(jnp.float32)
    snr = share / (1 - share)
    least = jnp.minimum(snr, gamma)
    if prediction_type == "epsilon":
        # At SNR 0 both are 0, and the noise is all there is to predict.
        return jnp.where(snr > 0, least / jnp.where(snr > 0, snr, 1.0), 1.0)
    if prediction_type == "v_prediction":
        return least / (snr + 1)
    if prediction_type == "sample":
        return least
    raise ValueError(f"prediction_type is {prediction_type!r}; accepted: {', '.join(PREDICTION_TYPES)}")


def offset_noise(noise: jax.Array, offset: jax.Array, strength: float) -> jax.Array:
    """Noise that shifts whole channels, so that the network learns images darker and brighter than the average.

    Args:
        noise: (B, H, W, C), standard normal.
        offset: (B, C), standard normal.
        strength: 0 for none; 0.1 where it was proposed (N. Guttenberg, "Diffusion with offset noise", 2023).

    Returns:
        (B, H, W, C).
    """
    return noise + strength * offset[:, None, None, :]


def image_conditioning(
    image_embeds: jax.Array,
    levels: jax.Array,
    noise: jax.Array,
    keep: jax.Array,
    *,
    alphas_cumprod: jax.Array,
    mean: jax.Array,
    std: jax.Array,
) -> jax.Array:
    """unCLIP's class labels in training: noised to a random level for each image, and dropped for some.

    Args:
        image_embeds: (B, D).
        levels: (B,) int in 0..999.
        noise: (B, D).
        keep: (B,) bool. False drops all of an image's condition, its level included (a quarter of them in the original,
            `embedding_dropout`).
        alphas_cumprod: As in `noise_image_embeddings`.
        mean: As in `noise_image_embeddings`.
        std: As in `noise_image_embeddings`.

    Returns:
        (B, 2 D).
    """
    labels = noise_image_embeddings(image_embeds, levels, noise, alphas_cumprod=alphas_cumprod, mean=mean, std=std)
    return jnp.where(keep[:, None], labels, 0.0)


def denoising_losses(
    denoise: Denoiser,
    x0: jax.Array,
    noise: jax.Array,
    timesteps: jax.Array,
    context: jax.Array,
    class_labels: jax.Array | None = None,
    *,
    alphas_cumprod: jax.Array,
    prediction_type: str,
    min_snr_gamma: float | None = None,
    added_channels: jax.Array | None = None,
    added_first: bool = False,
) -> jax.Array:
    """Each image's loss: the mean squared error of the prediction, weighted if `min_snr_gamma` is set.

    Source: the original's `LatentDiffusion.p_losses`, which is the mean of these over images without weights.

    Args:
        denoise: (noisy latents with any added channels, timesteps, context, class labels) -> prediction; a `UNet` is
            one.
        x0: (B, H, W, C), scaled latents.
        noise: (B, H, W, C).
        timesteps: (B,) int.
        context: (B, S, D).
        class_labels: As the UNet takes them.
        alphas_cumprod: (N,), from `unclip_jax.sampling.schedule.alphas_cumprod`.
        prediction_type: As in `prediction_target`.
        min_snr_gamma: As gamma in `min_snr_weights`; None for no weights.
        added_channels: (B, H, W, C'), what the network reads beside the noisy latents (depth, mask and masked latents,
            a small image).
        added_first: Whether it reads them before the latents, as estimators do.

    Returns:
        (B,) float32.
    """
    share = jnp.asarray(alphas_cumprod)[timesteps]
    x = add_noise(x0, noise, share)
    if added_channels is not None:
        added = added_channels.astype(x.dtype)
        x = jnp.concatenate([added, x] if added_first else [x, added], axis=-1)
    error = denoise(x, timesteps, context, class_labels).astype(jnp.float32) - prediction_target(
        prediction_type, x0, noise, share
    )
    losses = jnp.square(error).mean(axis=tuple(range(1, error.ndim)))
    return losses if min_snr_gamma is None else losses * min_snr_weights(prediction_type, share, min_snr_gamma)
