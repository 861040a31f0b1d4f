"""The layout of diffusers folders: a sub-folder a network; diffusers' names in UNet and VAE, transformers' in CLIP.

Foreign names here are "folder/tensor". `canonical` turns the dialects that older and newer releases wrote into the
names of this table.
"""

import re
from collections.abc import Mapping
from typing import Any

from convert.engine import Table, Unused
from convert.rules import depth, transformers
from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.models.unet import UNetConfig
from unclip_jax.models.vae import VAEConfig

RESNET = {name: name for name in ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut")}
TRANSFORMER = {
    **{name: name for name in ("norm", "proj_in", "proj_out")},
    **{f"norm{i}": f"transformer_blocks.0.norm{i}" for i in (1, 2, 3)},
    **{f"attn{i}.to_{p}": f"transformer_blocks.0.attn{i}.to_{p}" for i in (1, 2) for p in "qkv"},
    **{f"attn{i}.to_out": f"transformer_blocks.0.attn{i}.to_out.0" for i in (1, 2)},
    "ff.proj_in": "transformer_blocks.0.ff.net.0.proj",
    "ff.proj_out": "transformer_blocks.0.ff.net.2",
}
VAE_ATTENTION = {"norm": "group_norm", "to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}

# (pattern, canonical form): the attention of VAEs written before diffusers 0.18, and the text towers that
# transformers 5 writes without their prefix.
DIALECTS = [
    (r"(vae/.*\.mid_block\.attentions\.0)\.query\.(weight|bias)", r"\1.to_q.\2"),
    (r"(vae/.*\.mid_block\.attentions\.0)\.key\.(weight|bias)", r"\1.to_k.\2"),
    (r"(vae/.*\.mid_block\.attentions\.0)\.value\.(weight|bias)", r"\1.to_v.\2"),
    (r"(vae/.*\.mid_block\.attentions\.0)\.proj_attn\.(weight|bias)", r"\1.to_out.0.\2"),
    (r"((?:prior_)?text_encoder)/((?:embeddings|encoder|final_layer_norm)\..*)", r"\1/text_model.\2"),
]


def canonical(name: str) -> str:
    """A tensor's "folder/name" as this table has it, whatever release wrote the file."""
    for pattern, form in DIALECTS:
        if match := re.fullmatch(pattern, name):
            return match.expand(form)
    return name


def table(config: CheckpointConfig, params: Mapping[str, Any]) -> Table:
    """The rules for one architecture; `params` as `unclip_jax.checkpoints.networks.abstract_params` gives them."""
    t = Table(params)
    _unet(t, config.unet)
    _vae(t, config.vae)
    transformers.text_tower(t, "text_encoder/text_model", config.text_encoder.layers)
    if config.image_encoder is not None:
        transformers.vision_tower(t, "image_encoder/", config.image_encoder.layers)
    if config.image_embedding_dim is not None:
        for name in ("mean", "std"):
            t.tensor(f"image_normalizer.{name}", f"image_normalizer/{name}", "row")
    if config.depth_estimator is not None:
        depth.transformers(t, "depth_estimator/", config.depth_estimator)
    return t


def unused(config: CheckpointConfig) -> list[Unused]:
    """What a diffusers folder may hold that no network reads."""
    last = config.text_encoder.layers
    return [
        Unused(r"(text|image)_encoder/.*\.position_ids", "constants of older releases"),
        Unused(r"text_encoder/text_projection\.weight", "not part of the hidden states' path"),
        Unused(
            rf"text_encoder/text_model\.encoder\.layers\.{last}\..*",
            "the last text block: the penultimate layer's states are used",
        ),
    ]


def _unet(t: Table, config: UNetConfig) -> None:
    for name in (
        *(f"{kind}_embedding.linear_{i}" for kind in ("time", "class") for i in (1, 2)),
        *("class_embedding", "conv_in", "conv_norm_out", "conv_out"),
    ):
        t.module(f"unet.{name}", f"unet/{name}")
    levels = len(config.block_out_channels)
    blocks = [
        *((f"down_blocks.{i}", config.layers_per_block, "downsamplers") for i in range(levels)),
        ("mid_block", 2, ""),
        *((f"up_blocks.{i}", config.layers_per_block + 1, "upsamplers") for i in range(levels)),
    ]
    for block, count, resample in blocks:
        for i in range(count):
            for kind, inside in (("resnets", RESNET), ("attentions", TRANSFORMER)):
                for ours, theirs in inside.items():
                    t.module(f"unet.{block}.{kind}.{i}.{ours}", f"unet/{block}.{kind}.{i}.{theirs}")
        t.module(f"unet.{block}.resample", f"unet/{block}.{resample}.0.conv")


def _vae(t: Table, config: VAEConfig) -> None:
    for name in ("quant_conv", "post_quant_conv"):
        t.module(f"vae.{name}", f"vae/{name}")
    for half, blocks, resample, count in (
        ("encoder", "down_blocks", "downsamplers", config.layers_per_block),
        ("decoder", "up_blocks", "upsamplers", config.layers_per_block + 1),
    ):
        for name in ("conv_in", "conv_norm_out", "conv_out"):
            t.module(f"vae.{half}.{name}", f"vae/{half}.{name}")
        for level in range(len(config.block_out_channels)):
            block = f"{half}.{blocks}.{level}"
            for i in range(count):
                for name in RESNET:
                    t.module(f"vae.{block}.resnets.{i}.{name}", f"vae/{block}.resnets.{i}.{name}")
            t.module(f"vae.{block}.resample", f"vae/{block}.{resample}.0.conv")
        middle = f"{half}.mid_block"
        for i in range(2):
            for name in RESNET:
                t.module(f"vae.{middle}.resnets.{i}.{name}", f"vae/{middle}.resnets.{i}.{name}")
        for ours, theirs in VAE_ATTENTION.items():
            t.module(f"vae.{middle}.attention.{ours}", f"vae/{middle}.attentions.0.{theirs}")
