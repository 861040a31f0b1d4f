"""Writes a checkpoint as one file in the original's layout, and beside it what the file cannot hold."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from convert.architecture.presets import PRESETS
from convert.engine import export_tensors
from convert.export.controlnet import save_original_controlnet
from convert.export.original_yaml import original_yaml
from convert.export.prior import save_karlo_prior
from convert.export.tiny_vae import save_original_tiny_vae
from convert.rules import ldm
from convert.statistics import STATISTICS
from unclip_jax.checkpoints.atomic import atomic_files
from unclip_jax.checkpoints.checkpoint import Checkpoint, family_config
from unclip_jax.checkpoints.config import (
    CheckpointConfig,
    ControlNetCheckpointConfig,
    PriorCheckpointConfig,
    TinyVAECheckpointConfig,
)
from unclip_jax.checkpoints.stream import Progress, write_safetensors
from unclip_jax.models.configs import AutoencoderTinyConfig


def save_original(
    checkpoint: Checkpoint,
    destination: Path,
    *,
    dtype: np.dtype | None = None,
    progress: Progress = lambda nbytes: None,
) -> list[Path]:
    """Writes a `.safetensors` file under the original's names.

    What the original keeps in other files is written beside it: `<destination>.yaml` for an architecture that is not a
    published one, `<destination>.stats.npz` for embedding statistics other than 0 and 1. Tensors that no network reads
    (schedule buffers, the text tower's last block) are left out: the original code makes its own. A prior is written as
    Karlo's, see `convert.export.prior.save_karlo_prior`; a ControlNet as cldm's, see
    `convert.export.controlnet.save_original_controlnet`; a tiny autoencoder as TAESD's two files, see
    `convert.export.tiny_vae.save_original_tiny_vae`. Needs memory for one tensor at a time.

    Args:
        checkpoint: The open checkpoint.
        destination: The file, NAME.safetensors.
        dtype: The dtype to write; None keeps each tensor's own.
        progress: Called with the number of bytes written.

    Returns:
        Every file written, the checkpoint last.

    Raises:
        FileExistsError: A file of one of the names exists.
        ValueError: The name lacks the suffix `.safetensors`, or the layout does not have what the checkpoint has.
    """
    destination = Path(destination)
    if destination.suffix != ".safetensors":
        raise ValueError(f"destination is {destination}: the original's layout is one file, NAME.safetensors")
    if isinstance(checkpoint.config, PriorCheckpointConfig):
        return save_karlo_prior(checkpoint, destination, dtype=dtype, progress=progress)
    if isinstance(checkpoint.config, ControlNetCheckpointConfig):
        return save_original_controlnet(checkpoint, destination, dtype=dtype, progress=progress)
    if isinstance(checkpoint.config, TinyVAECheckpointConfig):
        return save_original_tiny_vae(checkpoint, destination, dtype=dtype, progress=progress)
    config = family_config(checkpoint)
    if isinstance(config.vae, AutoencoderTinyConfig):
        raise ValueError(f"{checkpoint.source}: its VAE is an AutoencoderTiny; the original's layout has none")
    params = {name: p for name, p in checkpoint.params.items() if name not in STATISTICS}
    tensors = export_tensors(ldm.table(config, params).rules, params)
    mean, std = (checkpoint.params[name].read() if name in checkpoint.params else None for name in STATISTICS)
    beside: dict[Path, bytes] = {}
    if _identity(config) not in map(_identity, PRESETS.values()):
        settings = yaml.safe_dump(original_yaml(config), sort_keys=False)
        beside[destination.with_name(f"{destination.name}.yaml")] = settings.encode()
    if mean is not None and std is not None and (mean.any() or (std != 1).any()):
        np.savez(buffer := io.BytesIO(), mean=mean, std=std)
        beside[destination.with_name(f"{destination.name}.stats.npz")] = buffer.getvalue()
    with atomic_files(destination, *beside) as partial:
        write_safetensors(partial / destination.name, tensors, dtype, {"format": "pt"}, progress)
        for path, content in beside.items():
            (partial / path.name).write_bytes(content)
    return [*beside, destination]


def _identity(config: CheckpointConfig) -> tuple[Any, ...]:
    """What the original's yaml states about an architecture."""
    networks = (config.unet, config.vae, config.text_encoder, config.image_encoder, config.depth_estimator is None)
    return *networks, *(config.scheduler_config.get(key) for key in ("prediction_type", "beta_start", "beta_end"))
