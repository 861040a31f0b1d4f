"""Writes diffusers' folder of one model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax.checkpoints.atomic import atomic_directory
from unclip_jax.checkpoints.checkpoint import Parameter
from unclip_jax.checkpoints.stream import Progress, write_safetensors


def json_text(data: Mapping[str, Any]) -> str:
    """The text of a JSON file, as diffusers writes it."""
    return json.dumps(data, indent=2, sort_keys=True) + "\n"


def write_model_folder(
    destination: Path,
    described: Mapping[str, Any],
    tensors: Mapping[str, Parameter],
    dtype: np.dtype | None,
    progress: Progress,
) -> list[Path]:
    """The folder that the `from_pretrained` of a model's class opens.

    Args:
        destination: The folder to create.
        described: Its config.json.
        tensors: Its weights.
        dtype: The dtype to write; None keeps each tensor's own.
        progress: Called with the number of bytes written.

    Returns:
        The folder's path, in a list of one.
    """
    with atomic_directory(destination) as partial:
        (partial / "config.json").write_text(json_text(described), "utf-8")
        write_safetensors(partial / "diffusion_pytorch_model.safetensors", tensors, dtype, {"format": "pt"}, progress)
    return [destination]
