"""The layout of diffusers folders: one folder per part, in diffusers' and transformers' dialects.

Foreign names here are "folder/tensor".
"""

from collections.abc import Mapping
from typing import Any

from convert import layouts
from convert.engine import Table, Unused
from convert.layouts import Place, Places
from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.models.configs import AutoencoderTinyConfig

PLACES: Places = {
    "unet": Place("unet/", "diffusers"),
    "vae": Place("vae/", "diffusers"),
    "text_encoder": Place("text_encoder/", "transformers"),
    "image_encoder": Place("image_encoder/", "transformers"),
    "image_normalizer": Place("image_normalizer/", "diffusers"),
    "depth_estimator": Place("depth_estimator/", "transformers"),
}


def canonical(name: str) -> str:
    """The table's form of a tensor's "folder/name", whatever release of diffusers and transformers wrote the file."""
    folder, _, within = name.partition("/")
    part = folder.removeprefix("prior_")
    if part not in PLACES:
        return name
    return f"{folder}/{layouts.PARTS[part][PLACES[part].dialect].canonical(within)}"


def table(config: CheckpointConfig, params: Mapping[str, Any]) -> Table:
    """The rules for one architecture; `params` as `unclip_jax.checkpoints.networks.abstract_params` gives them."""
    return layouts.table(config, params, places_of(config))


def places_of(config: CheckpointConfig) -> Places:
    """The places of a folder's parts, whose VAE may be a tiny autoencoder."""
    tiny = isinstance(config.vae, AutoencoderTinyConfig)
    return {**PLACES, "vae": Place("vae/", "tiny")} if tiny else PLACES


def unused(config: CheckpointConfig) -> list[Unused]:
    """What a diffusers folder may hold that no network reads."""
    return layouts.unused(config, places_of(config))
