"""Writes a ControlNet as diffusers' folder of the model, or as one file under the original's names."""

from pathlib import Path
from typing import Any

import numpy as np

from convert.architecture import controlnet as architecture
from convert.controlnet import CONFIG_SUFFIX, PART
from convert.engine import Table, export_tensors
from convert.export.diffusers_configs import VERSION, _encoder
from convert.export.model_folder import json_text, write_model_folder
from convert.readers import CheckpointError, TensorInfo
from convert.rules import controlnet as rules
from unclip_jax.checkpoints.atomic import atomic_files
from unclip_jax.checkpoints.checkpoint import Checkpoint, controlnet_config
from unclip_jax.checkpoints.stream import Progress, write_safetensors
from unclip_jax.models.configs import ControlNetConfig

ROOT = "control_model."


def save_original_controlnet(
    checkpoint: Checkpoint, destination: Path, *, dtype: np.dtype | None, progress: Progress
) -> list[Path]:
    """Writes a `.safetensors` file under the original's names.

    An architecture that the tensors do not show is written beside it, as `<destination>.config.json`: diffusers'
    description. See `convert.architecture.controlnet.from_tensors`.

    Args:
        checkpoint: The open checkpoint.
        destination: The file.
        dtype: The dtype to write; None keeps each tensor's own.
        progress: Called with the number of bytes written.

    Returns:
        Every file written, the ControlNet last.
    """
    config = controlnet_config(checkpoint)
    rules.ldm(table := Table(checkpoint.params), ROOT, config)
    tensors = export_tensors(table.rules, checkpoint.params)
    shown = {name.removeprefix(ROOT): TensorInfo(p.shape, p.dtype) for name, p in tensors.items()}
    described = controlnet_json(config)
    beside = [] if _shown(shown) == described else [destination.with_name(destination.name + CONFIG_SUFFIX)]
    with atomic_files(destination, *beside) as partial:
        write_safetensors(partial / destination.name, tensors, dtype, {"format": "pt"}, progress)
        for path in beside:
            (partial / path.name).write_text(json_text(described), "utf-8")
    return [*beside, destination]


def save_diffusers_controlnet(
    checkpoint: Checkpoint, destination: Path, *, dtype: np.dtype | None, progress: Progress
) -> list[Path]:
    """Writes the folder that diffusers' `ControlNetModel.from_pretrained` opens.

    Args:
        checkpoint: The open checkpoint.
        destination: The folder to create.
        dtype: The dtype to write; None keeps each tensor's own.
        progress: Called with the number of bytes written.

    Returns:
        The folder's path, in a list of one.
    """
    config = controlnet_config(checkpoint)
    rules.diffusers(table := Table(checkpoint.params), "", config)
    tensors = export_tensors(table.rules, checkpoint.params)
    return write_model_folder(destination, controlnet_json(config), tensors, dtype, progress)


def controlnet_json(config: ControlNetConfig) -> dict[str, Any]:
    """diffusers' config.json for a ControlNet."""
    return {
        "_class_name": architecture.CLASSES[0],
        "_diffusers_version": VERSION,
        **_encoder(config.unet),
        "conditioning_channels": config.conditioning_channels,
        "conditioning_embedding_out_channels": list(config.conditioning_embedding_out_channels),
        "controlnet_conditioning_channel_order": config.controlnet_conditioning_channel_order,
        "global_pool_conditions": config.global_pool_conditions,
    }


def _shown(tensors: dict[str, TensorInfo]) -> dict[str, Any] | None:
    """The description that the original's tensors give by themselves."""
    try:
        return controlnet_json(architecture.from_tensors(tensors, "ldm", PART))
    except CheckpointError:
        return None
