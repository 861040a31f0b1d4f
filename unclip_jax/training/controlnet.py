"""A ControlNet in training: how it begins, and the denoiser that it makes together with its base."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.checkpoints.networks import Network
from unclip_jax.conditioning.canny import canny
from unclip_jax.models.configs import ControlNetConfig
from unclip_jax.models.controlnet import ControlNetModel
from unclip_jax.models.unet import UNet
from unclip_jax.training.data import Record, named_image
from unclip_jax.training.initial import initial_network
from unclip_jax.training.objectives import Denoiser
from unclip_jax.training.settings import TrainSettings
from unclip_jax.training.transforms import Cut, Hint


def fitting_config(config: CheckpointConfig) -> ControlNetConfig:
    """The architecture of a ControlNet for a checkpoint: of the published ones' widths, for latents of its size."""
    widths = ControlNetConfig().conditioning_embedding_out_channels
    levels = len(config.vae.block_out_channels)
    widths = (*widths[:levels], *widths[-1:] * (levels - len(widths)))
    unet = dataclasses.replace(config.unet, in_channels=config.vae.latent_channels)
    return ControlNetConfig(unet, conditioning_embedding_out_channels=widths)


def initial_controlnet(config: ControlNetConfig, unet: Mapping[str, jax.Array], seed: int, **options: Any) -> Network:
    """A ControlNet that begins as a copy of a UNet's encoder, and adds nothing.

    Source: arXiv:2302.05543: the last convolution of the hint's embedding, and those of all that it adds, are zeros.

    Args:
        config: Its architecture.
        unet: The UNet's parameters.
        seed: Determines the weights of the hint's embedding.
        **options: Other arguments of the network, such as `remat`.

    Returns:
        The network, in float32.
    """
    network = initial_network(ControlNetModel, config, seed, **options)
    params = {}
    for name, value in network.params.items():
        if name.startswith(("zero_convs.", "mid_zero_conv.", "hint_embedding.conv_out.")):
            params[name] = jnp.zeros_like(value)
        elif name.startswith("hint_embedding."):
            params[name] = value
        elif name == "conv_in.kernel":  # without what a UNet reads beside the latents
            params[name] = jnp.array(unet[name][:, :, : value.shape[2]], jnp.float32)
        else:
            params[name] = jnp.array(unet[name], jnp.float32)  # a copy: training gives its own away at every step
    return Network(network.graphdef, params)


def controlled(unet: UNet, controlnet: ControlNetModel, hint: jax.Array) -> Denoiser:
    """A UNet that a ControlNet adds to. hint: (B, H, W, conditioning_channels) in 0..1."""
    channels = controlnet.conv_in.kernel.shape[2]

    def denoise(
        x: jax.Array, timesteps: jax.Array, context: jax.Array, class_labels: jax.Array | None = None
    ) -> jax.Array:
        own = None if controlnet.class_embedding is None else class_labels
        residuals = controlnet(x[..., :channels], timesteps, context, hint, own)
        prediction: jax.Array = unet(x, timesteps, context, class_labels, residuals)
        return prediction

    return denoise


def hint_of(settings: TrainSettings) -> Hint:
    """What makes the hint of an example, (H, W, 3) float32 in 0..1. Raises ValueError for data that cannot have one."""
    own = settings.controlnet

    def edges(record: Record, image: np.ndarray, cut: Cut) -> np.ndarray:
        return _shares(np.asarray(canny(image, own.low_threshold, own.high_threshold)))

    def of_column(record: Record, image: np.ndarray, cut: Cut) -> np.ndarray:
        return _shares(cut(named_image(record, own.hint)))

    if own.hint == "canny":
        return edges
    if settings.data.image_folder is None:
        raise ValueError(f"controlnet.hint is {own.hint!r}, a column; want data.image_folder, with the files it names")
    return of_column


def _shares(image: np.ndarray) -> np.ndarray:
    return image.astype(np.float32) / 255
