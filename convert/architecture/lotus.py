"""Recognises Lotus, estimators of depth or normals that predict a map at once (He et al. 2024, arXiv:2409.18124).

Its folders name a pipeline class of its own repository, and only their names say what is estimated.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

from convert.architecture.names import names_of
from convert.readers import CheckpointError
from unclip_jax.checkpoints.config import CheckpointConfig, EstimatorConfig, Task

CLASSES = re.compile(r"DirectDiffusion(Y0)?Pipeline|Lotus[DG]Pipeline")
NAMES: dict[Task, str] = {"normals": "normal", "depth": "depth"}
LABELS = 4  # the sines and cosines of two switches: to estimate, and to give the image back


def as_lotus(config: CheckpointConfig, path: Path, origin: Any) -> CheckpointConfig:
    """The configuration of a folder of these classes.

    Args:
        config: What its networks' files say.
        path: The folder.
        origin: `_name_or_path` of its model_index.json.

    Returns:
        The configuration of an estimator, for the task that the name says, or for none.

    Raises:
        CheckpointError: The UNet is not one of Lotus.
    """
    unet, latents = config.unet, config.vae.latent_channels
    if unet.class_embedding != "projection" or unet.class_embedding_size != LABELS:
        raise CheckpointError(
            f"unet/config.json: its class embedding is {unet.class_embedding!r} of {unet.class_embedding_size}; "
            f"Lotus needs 'projection' of {LABELS}"
        )
    if unet.in_channels not in (latents, 2 * latents):
        raise CheckpointError(
            f"unet/config.json: in_channels is {unet.in_channels}; Lotus needs {latents}, or {2 * latents} with noise"
        )
    name = " ".join(names_of(path, origin)).lower()
    prediction = "disparity" if "disparity" in name else None
    estimator = EstimatorConfig(prediction, num_inference_steps=1, processing_resolution=768, direct=True)
    named = [task for task, word in NAMES.items() if word in name]
    return dataclasses.replace(config, estimator=estimator, trained_for=named[0] if len(named) == 1 else None)
