"""The layout of Stability's original files (`.ckpt`, `.safetensors`): where a file of Stability-AI/stablediffusion has
each part, and in which dialect.
"""

from collections.abc import Mapping
from typing import Any

from convert import layouts
from convert.engine import Table, Unused
from convert.layouts import Place, Places
from unclip_jax.checkpoints.config import CheckpointConfig

UNET, VAE, TEXT, VISION = "model.diffusion_model", "first_stage_model", "cond_stage_model.model", "embedder.model"
DEPTH = "depth_model.model"
PLACES: Places = {
    "unet": Place(f"{UNET}.", "ldm"),
    "vae": Place(f"{VAE}.", "ldm"),
    "text_encoder": Place(f"{TEXT}.", "open_clip"),
    "image_encoder": Place(f"{VISION}.", "open_clip"),
    "depth_estimator": Place(f"{DEPTH}.", "midas"),
}


def table(config: CheckpointConfig, params: Mapping[str, Any]) -> Table:
    """The rules for one architecture; `params` as `unclip_jax.checkpoints.networks.abstract_params` gives them."""
    return layouts.table(config, params, PLACES)


def unused(config: CheckpointConfig) -> list[Unused]:
    """What an original file may hold that no network reads."""
    return layouts.unused(config, PLACES)
