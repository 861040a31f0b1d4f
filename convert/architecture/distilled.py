"""Recognises sd-turbo and its copies, which make an image in one to four steps without guidance.

Its tensors are those of 512-base, and so are most of its settings: only a name tells it.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

from convert.architecture.names import names_of
from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.reference import Reference

NAME = re.compile(r"(?<![a-z])sd[-_. ]?turbo(?![a-z])", re.IGNORECASE)
TRAILING = {"timestep_spacing": "trailing"}


def is_named_turbo(path: Path, origin: Any = None) -> bool:
    """Whether a file or folder, or where it came from, is called sd-turbo, in any spelling, with more around it.

    path, origin: as for `convert.architecture.names.names_of`.
    """
    return any(map(NAME.search, names_of(path, origin)))


def as_distilled(config: CheckpointConfig) -> CheckpointConfig:
    """The configuration of a checkpoint called sd-turbo: marked as distilled, where the rest of it fits.

    A single file has no solver of its own, and gets that of the published folder: Euler's with trailing timesteps.
    """
    settings = config.scheduler_config
    of_text = config.unet.in_channels == config.vae.latent_channels and config.image_embedding_dim is None
    if not of_text or settings.get("prediction_type", "epsilon") != "epsilon":
        return config
    if config.reference == Reference.ORIGINAL:
        euler = {**settings, "_class_name": "EulerDiscreteScheduler", **TRAILING}
        return dataclasses.replace(config, distilled=True, scheduler="euler", scheduler_config=euler)
    return dataclasses.replace(config, distilled=settings.get("timestep_spacing") == "trailing")
