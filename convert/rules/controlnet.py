"""A ControlNet's names: the original's (cldm) and diffusers'. Its encoder has those of the UNet's.

The original numbers the convolutions of the hint with the activations between them.
"""

import itertools
from collections.abc import Iterator

from convert.engine import Dialect, Table
from convert.rules import unet
from unclip_jax.models.configs import ControlNetConfig

OWN = "controlnet."


def ldm(t: Table, prefix: str, config: ControlNetConfig) -> None:
    """The original's names; all begin with `prefix`."""
    unet.ldm_encoder(t, OWN, prefix, config.unet)
    for number, name in enumerate(_hint(config)):
        t.module(f"{OWN}hint_embedding.{name}", f"{prefix}input_hint_block.{2 * number}")
    for i in range(_zero_convs(config)):
        t.module(f"{OWN}zero_convs.{i}", f"{prefix}zero_convs.{i}.0")
    t.module(f"{OWN}mid_zero_conv", f"{prefix}middle_block_out.0")


def diffusers(t: Table, prefix: str, config: ControlNetConfig) -> None:
    """diffusers' names; all begin with `prefix`."""
    unet.diffusers_encoder(t, OWN, prefix, config.unet)
    for name in _hint(config):
        t.module(f"{OWN}hint_embedding.{name}", f"{prefix}controlnet_cond_embedding.{name}")
    for i in range(_zero_convs(config)):
        t.module(f"{OWN}zero_convs.{i}", f"{prefix}controlnet_down_blocks.{i}")
    t.module(f"{OWN}mid_zero_conv", f"{prefix}controlnet_mid_block")


def _hint(config: ControlNetConfig) -> Iterator[str]:
    """The hint's convolutions, in order: two for each halving, between the first and the last."""
    blocks = 2 * (len(config.conditioning_embedding_out_channels) - 1)
    return itertools.chain(("conv_in",), (f"blocks.{i}" for i in range(blocks)), ("conv_out",))


def _zero_convs(config: ControlNetConfig) -> int:
    """One for the first convolution, each layer on the way down, and each halving."""
    levels = len(config.unet.block_out_channels)
    return levels * (config.unet.layers_per_block + 1)


DIALECTS = {
    "ldm": Dialect(
        ldm, r"(input_blocks|middle_block|time_embed|label_emb|input_hint_block|zero_convs|middle_block_out)\..*"
    ),
    "diffusers": Dialect(
        diffusers,
        r"(down_blocks|mid_block|conv_in|time_embedding|class_embedding|controlnet_cond_embedding"
        r"|controlnet_down_blocks|controlnet_mid_block)\..*",
    ),
}
