"""Writes a tiny autoencoder as diffusers' folder of the model, or as TAESD's two files."""

import dataclasses
from pathlib import Path

import numpy as np

from convert.engine import Table, export_tensors
from convert.export.diffusers_configs import tiny_vae_json
from convert.export.model_folder import write_model_folder
from convert.rules.tiny_vae import DIALECTS
from convert.tiny_vae import HALVES
from unclip_jax.checkpoints.atomic import atomic_files
from unclip_jax.checkpoints.checkpoint import Checkpoint, tiny_vae_config
from unclip_jax.checkpoints.stream import Progress, write_safetensors
from unclip_jax.models.configs import AutoencoderTinyConfig

# What TAESD's files do not show: there it is always this.
_NOT_SHOWN = {
    name: getattr(AutoencoderTinyConfig, name) for name in ("scaling_factor", "latent_magnitude", "latent_shift")
}


def save_original_tiny_vae(
    checkpoint: Checkpoint, destination: Path, *, dtype: np.dtype | None, progress: Progress
) -> list[Path]:
    """Writes TAESD's two files, NAME_encoder.safetensors and NAME_decoder.safetensors.

    Args:
        checkpoint: The open checkpoint.
        destination: NAME.safetensors, which itself is not written.
        dtype: The dtype to write; None keeps each tensor's own.
        progress: Called with the number of bytes written.

    Returns:
        Both files.

    Raises:
        ValueError: The files would not show what the checkpoint has.
    """
    config = tiny_vae_config(checkpoint)
    if config != dataclasses.replace(config, **_NOT_SHOWN):
        raise ValueError(f"{checkpoint.source}: TAESD's files mean {_NOT_SHOWN}; write a diffusers folder")
    DIALECTS["taesd"].table(table := Table(checkpoint.params), "", config)
    tensors = export_tensors(table.rules, checkpoint.params)
    files = {half: destination.with_name(f"{destination.stem}_{half}.safetensors") for half in HALVES}
    with atomic_files(*files.values()) as partial:
        for half, path in files.items():
            own = {name.removeprefix(f"{half}."): p for name, p in tensors.items() if name.startswith(f"{half}.")}
            write_safetensors(partial / path.name, own, dtype, {"format": "pt"}, progress)
    return list(files.values())


def save_diffusers_tiny_vae(
    checkpoint: Checkpoint, destination: Path, *, dtype: np.dtype | None, progress: Progress
) -> list[Path]:
    """Writes the folder that diffusers' `AutoencoderTiny.from_pretrained` opens.

    Args:
        checkpoint: The open checkpoint.
        destination: The folder to create.
        dtype: The dtype to write; None keeps each tensor's own.
        progress: Called with the number of bytes written.

    Returns:
        The folder's path, in a list of one.
    """
    config = tiny_vae_config(checkpoint)
    DIALECTS["tiny"].table(table := Table(checkpoint.params), "", config)
    tensors = export_tensors(table.rules, checkpoint.params)
    return write_model_folder(destination, tiny_vae_json(config), tensors, dtype, progress)
