"""A tiny autoencoder in training: it learns a checkpoint's latents, and the way from them to images (as TAESD did)."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.checkpoints.checkpoint import family_config, tiny_vae_config
from unclip_jax.checkpoints.loading import load_networks
from unclip_jax.checkpoints.networks import abstract_network, class_of
from unclip_jax.checkpoints.source import open_checkpoint, open_tiny_vae
from unclip_jax.conditioning.latents import latents_from_moments
from unclip_jax.models.configs import AutoencoderTinyConfig, VAEConfig
from unclip_jax.models.tiny_autoencoder import AutoencoderTiny
from unclip_jax.training.data import stacked
from unclip_jax.training.initial import initial_network
from unclip_jax.training.settings import TinyVAESettings, TrainSettings
from unclip_jax.training.setup import (
    averages,
    examples_of,
    mesh_of,
    run,
    save_tiny_vae,
    training_records,
    validation_records,
)
from unclip_jax.training.step import TrainState
from unclip_jax.training.transforms import ExampleLoader
from unclip_jax.training.vae_losses import gradient_difference, psnr


def tiny_autoencoder(settings: TrainSettings, progress: bool) -> Path:
    """Trains a tiny autoencoder beside a checkpoint, whose VAE shows what it is to do and stays as it is."""
    options, made = settings.tiny_vae, Path(settings.out) / "model"
    mesh, dtype = mesh_of(settings), jnp.dtype(settings.dtype)
    with open_checkpoint(settings.model) as checkpoint:
        config = family_config(checkpoint)
        if not isinstance(config.vae, VAEConfig):
            raise ValueError(f"model is {settings.model}: its VAE is itself a tiny autoencoder; want the full one")
        side = settings.data.resolution or config.unet.sample_size * config.vae.factor
        if side < 1 or side % config.vae.factor:
            raise ValueError(f"data.resolution is {side}; want a multiple of {config.vae.factor}")
        if options.model is None:
            own = fitting_config(config.vae, options)
            network = initial_network(AutoencoderTiny, own, settings.seed, dtype=dtype)
        else:
            with open_tiny_vae(options.model) as other:
                own = tiny_vae_config(other)
                network = abstract_network(AutoencoderTiny, own, dtype, jnp.float32)
                network = load_networks(other, {"vae": network}, mesh, progress)["vae"]
        teacher = abstract_network(class_of("vae", config.vae), config.vae, dtype)
        teacher = load_networks(checkpoint, {"vae": teacher}, mesh, progress)["vae"]
        scale = config.vae.scaling_factor

        def losses(shown: Any, params: Any, batch: Any, step: jax.Array) -> Any:
            model, image = network.merge(params), batch["image"]
            latents = latents_from_moments(teacher.merge(shown).moments(image), None, scale)
            decoded = model.decode(latents / own.scaling_factor)
            off = model.encode(image) * own.scaling_factor - latents
            each = distillation_losses(decoded, image, off, options)
            return each, {"psnr": psnr(decoded, image).mean(), "latents_off": jnp.abs(off).mean()}

        load = ExampleLoader(side, settings.data.crop, settings.data.flip)
        held_out = examples_of(validation_records(settings.data), load, settings.seed)

        @jax.jit
        def quality(shown: Any, params: Any, image: jax.Array) -> tuple[jax.Array, jax.Array]:
            model, full = network.merge(params), teacher.merge(shown)
            latents = latents_from_moments(full.moments(image), None, scale)
            wanted = jnp.clip(full.decode(latents / scale), -1, 1)
            decoded, again = (
                jnp.clip(model.decode(z / own.scaling_factor), -1, 1)
                for z in (latents, model.encode(image) * own.scaling_factor)
            )
            return psnr(decoded, wanted)[0], psnr(again, image)[0]

        def validate(state: TrainState) -> dict[str, float]:
            assert state.average is not None
            images = [stacked([row])["image"] for row in held_out]
            values = np.mean([quality(teacher.params, state.average.params, image) for image in images], axis=0)
            return {"loss": -float(values.mean()), "psnr_to_full": float(values[0]), "psnr_alone": float(values[1])}

        state = run(
            settings,
            jax.tree_util.Partial(losses, teacher.params),
            network.params,
            training_records(settings.data),
            load,
            mesh,
            progress,
            validate=validate if held_out else None,
        )
        save_tiny_vae(checkpoint, own, averages(state), made)
    return made


def fitting_config(vae: VAEConfig, options: TinyVAESettings) -> AutoencoderTinyConfig:
    """The architecture of a tiny autoencoder for the latents of a VAE: TAESD's, but for its width and its blocks."""
    levels = len(vae.block_out_channels)
    counts = (1, *(options.blocks,) * (levels - 1))
    return AutoencoderTinyConfig(
        in_channels=vae.in_channels,
        latent_channels=vae.latent_channels,
        encoder_block_out_channels=(options.width,) * levels,
        decoder_block_out_channels=(options.width,) * levels,
        num_encoder_blocks=counts,
        num_decoder_blocks=counts[::-1],
    )


def distillation_losses(made: jax.Array, wanted: jax.Array, off: jax.Array, options: TinyVAESettings) -> jax.Array:
    """Each image's loss: mean absolute error of what is decoded, and the weighted terms beside it.

    Args:
        made: (B, H, W, C) in -1..1, decoded from the full autoencoder's latents.
        wanted: (B, H, W, C) in -1..1, the image.
        off: (B, h, w, C'), the encoder's latents less those of the full one, both as the UNet has them.
        options: The weights.

    Returns:
        (B,) float32.
    """
    error = made.astype(jnp.float32) - wanted.astype(jnp.float32)
    losses = jnp.abs(error).mean(axis=(1, 2, 3)) + options.squared_weight * jnp.square(error).mean(axis=(1, 2, 3))
    losses += options.latent_weight * jnp.square(off).mean(axis=(1, 2, 3))
    if options.gradient_weight:
        losses += options.gradient_weight * gradient_difference(made, wanted)
    return losses
