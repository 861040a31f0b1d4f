"""Small tiny autoencoders with random weights, open as if from a file, and the published one's tensors."""

import numpy as np

from convert.random import random_parameter
from unclip_jax.checkpoints.checkpoint import Checkpoint
from unclip_jax.checkpoints.config import TinyVAECheckpointConfig
from unclip_jax.checkpoints.networks import abstract_params
from unclip_jax.models.configs import AutoencoderTinyConfig

# Of the factor of `tests.small_models.SMALL`, and with as many latent channels.
SMALL = AutoencoderTinyConfig(
    encoder_block_out_channels=(8, 8),
    decoder_block_out_channels=(12, 12),
    num_encoder_blocks=(1, 2),
    num_decoder_blocks=(2, 0),
)
# The modules of TAESD's halves in order, as github.com/madebyollin/taesd lists them: a convolution, a block, and what
# has no weights; a convolution without a bias is in small letters.
ENCODER = "C B cBBB cBBB cBBB C"
DECODER = "- C- BBB -c BBB -c BBB -c B C"
WIDTH = 64


def checkpoint(config: AutoencoderTinyConfig = SMALL, seed: int = 0) -> Checkpoint:
    settings = TinyVAECheckpointConfig(config)
    params = {name: random_parameter(name, spec.shape, seed) for name, spec in abstract_params(settings).items()}
    return Checkpoint(settings, None, params, "random")


def original_shapes(modules: str, inner: int, outer: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """The tensors of one of TAESD's files. inner, outer: the channels that the half reads and makes."""
    found: dict[str, tuple[int, ...]] = {}
    units = modules.replace(" ", "")
    last = max(index for index, kind in enumerate(units) if kind == "C")
    for index, kind in enumerate(units):
        if kind == "B":
            for conv in (0, 2, 4):
                found[f"{index}.conv.{conv}.weight"] = (WIDTH, WIDTH, 3, 3)
                found[f"{index}.conv.{conv}.bias"] = (WIDTH,)
        elif kind in "Cc":
            read, made = inner if index == units.index("C") else WIDTH, outer if index == last else WIDTH
            found[f"{index}.weight"] = (made, read, 3, 3)
            found |= {f"{index}.bias": (made,)} if kind == "C" else {}
    return {name: (shape, np.dtype(np.float32)) for name, shape in found.items()}
