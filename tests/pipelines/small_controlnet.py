"""The smallest of ControlNets, of random weights: its last convolutions are not zeros."""

from convert.random import random_parameter
from tests import small_models
from tests.pipelines.small_family import one_level
from unclip_jax.checkpoints.checkpoint import Checkpoint
from unclip_jax.checkpoints.config import ControlNetCheckpointConfig
from unclip_jax.checkpoints.networks import abstract_params
from unclip_jax.models.configs import ControlNetConfig

BASE = one_level(small_models.TEXT_TO_IMAGE).unet
CONFIG = ControlNetConfig(BASE, conditioning_embedding_out_channels=(8, 16))  # for latents of half the image's size


def checkpoint(config=CONFIG, seed=5):
    settings = ControlNetCheckpointConfig(config)
    params = {name: random_parameter(name, spec.shape, seed) for name, spec in abstract_params(settings).items()}
    return Checkpoint(settings, None, params, "random")
