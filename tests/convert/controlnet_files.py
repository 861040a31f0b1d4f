"""Small ControlNets with random weights, open as if from a file, and the published one's tensors."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from convert.random import random_parameter
from tests.convert.published_files import shapes
from unclip_jax.checkpoints.checkpoint import Checkpoint
from unclip_jax.checkpoints.config import ControlNetCheckpointConfig
from unclip_jax.checkpoints.networks import abstract_params
from unclip_jax.models.configs import ControlNetConfig, UNetConfig

# Heads as wide as Stable Diffusion 2's: the tensors show everything.
SHOWN = ControlNetConfig(
    UNetConfig(
        block_out_channels=(64, 128),
        layers_per_block=1,
        attention_levels=(True, False),
        num_heads=(1, 2),
        cross_attention_dim=16,
        only_cross_attention=(False, False),
    ),
    conditioning_embedding_out_channels=(4, 8),
)
# Nothing of this is shown but the sizes.
DESCRIBED = ControlNetConfig(
    dataclasses.replace(
        SHOWN.unet,
        block_out_channels=(16, 32),
        num_heads=(2, 4),
        norm_groups=8,
        class_embedding="projection",
        class_embedding_size=6,
    ),
    conditioning_channels=2,
    conditioning_embedding_out_channels=(4,),
    controlnet_conditioning_channel_order="bgr",
    global_pool_conditions=True,
)
# A ladder of hint convolutions and zero convolutions as cldm/cldm.py of lllyasviel/ControlNet builds them for
# Stable Diffusion 2.1: (channels in, channels out) of each.
HINT = ((3, 16), (16, 16), (16, 32), (32, 32), (32, 96), (96, 96), (96, 256), (256, 320))
ZEROS = (320, 320, 320, 320, 640, 640, 640, 1280, 1280, 1280, 1280, 1280)


def checkpoint(config: ControlNetConfig = SHOWN) -> Checkpoint:
    settings = ControlNetCheckpointConfig(config)
    params = {name: random_parameter(name, spec.shape, 0) for name, spec in abstract_params(settings).items()}
    return Checkpoint(settings, None, params, "random")


def original_shapes() -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """The original's tensors at full size: its UNet's encoder, and what cldm adds."""
    root, dtype = "model.diffusion_model.", np.dtype(np.float32)
    encoder = tuple(f"{root}{block}." for block in ("time_embed", "input_blocks", "middle_block"))
    found: dict[str, tuple[tuple[int, ...], np.dtype]] = {
        name.removeprefix(root): value for name, value in shapes("v2-inference").items() if name.startswith(encoder)
    }
    added: Mapping[str, tuple[int, int, int]] = {
        **{f"input_hint_block.{2 * i}": (into, out, 3) for i, (into, out) in enumerate(HINT)},
        **{f"zero_convs.{i}.0": (width, width, 1) for i, width in enumerate(ZEROS)},
        "middle_block_out.0": (1280, 1280, 1),
    }
    for name, (into, out, side) in added.items():
        found |= {f"{name}.weight": ((out, into, side, side), dtype), f"{name}.bias": ((out,), dtype)}
    return {f"control_model.{name}": value for name, value in found.items()}
