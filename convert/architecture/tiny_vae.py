"""The architecture of a tiny autoencoder, from diffusers' description, or from TAESD's tensors alone."""

import itertools
import re
from collections.abc import Mapping
from pathlib import Path

from convert.architecture.diffusers import _Config, _tiny_vae
from convert.readers import CheckpointError, TensorInfo
from unclip_jax.models.configs import AutoencoderTinyConfig


def from_config(path: Path) -> AutoencoderTinyConfig:
    """The architecture in diffusers' config.json.

    Raises:
        CheckpointError: It is not supported. The message names file and key.
    """
    return _tiny_vae(_Config(path))


def from_tensors(tensors: Mapping[str, TensorInfo], where: str) -> AutoencoderTinyConfig:
    """The architecture that tensors show, in either dialect: `convert.rules.tiny_vae`.

    Args:
        tensors: By names that begin with the half's.
        where: What a message calls them.

    Raises:
        CheckpointError: They are not those of a tiny autoencoder.
    """
    shapes, counts = {}, {}
    for half in ("encoder", "decoder"):
        parts = _parts(tensors, half)
        convs = [number for number, name in sorted(parts.items()) if not name.endswith("conv.0.weight")]
        if len(convs) < 2 or any(len(tensors[name].shape) != 4 for name in parts.values()):
            raise CheckpointError(f"{where}: no tiny autoencoder: its {half} has {len(convs)} convolutions; want two")
        between = itertools.pairwise(convs)
        counts[half] = tuple(sum(first < number < last for number in parts) for first, last in between)
        shapes[half] = tensors[parts[convs[0]]].shape
    try:
        return AutoencoderTinyConfig(
            in_channels=shapes["encoder"][1],
            latent_channels=shapes["decoder"][1],
            encoder_block_out_channels=(shapes["encoder"][0],) * len(counts["encoder"]),
            decoder_block_out_channels=(shapes["decoder"][0],) * len(counts["decoder"]),
            num_encoder_blocks=counts["encoder"],
            num_decoder_blocks=counts["decoder"],
        )
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _parts(tensors: Mapping[str, TensorInfo], half: str) -> dict[int, str]:
    """The numbered convolutions and blocks of a half -> a tensor that tells which of both it is."""
    pattern = re.compile(rf"{half}\.(?:layers\.)?(\d{{1,4}})\.(?:conv\.0\.)?weight")
    return {int(match[1]): name for name in tensors if (match := pattern.fullmatch(name))}
