"""The layout of Stability's original files (`.ckpt`, `.safetensors`): the names of Stability-AI/stablediffusion.

Block numbers run through the whole UNet there (`input_blocks.0` .. `output_blocks.11`), the VAE's decoder counts its
levels from the lowest resolution up, and the CLIP towers keep open_clip's names with query, key and value fused.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from convert.engine import Table, Unused
from convert.rules import depth, open_clip
from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.models.unet import UNetConfig
from unclip_jax.models.vae import VAEConfig

UNET, VAE, TEXT, VISION = "model.diffusion_model", "first_stage_model", "cond_stage_model.model", "embedder.model"
DEPTH = "depth_model.model"

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
TRANSFORMER = {
    "norm": "norm",
    "proj_in": "proj_in",
    "proj_out": "proj_out",
    **{f"norm{i}": f"transformer_blocks.0.norm{i}" for i in (1, 2, 3)},
    **{f"attn{i}.to_{p}": f"transformer_blocks.0.attn{i}.to_{p}" for i in (1, 2) for p in "qkv"},
    **{f"attn{i}.to_out": f"transformer_blocks.0.attn{i}.to_out.0" for i in (1, 2)},
    "ff.proj_in": "transformer_blocks.0.ff.net.0.proj",
    "ff.proj_out": "transformer_blocks.0.ff.net.2",
}
VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}

SCHEDULE = (
    r"betas|alphas_cumprod|alphas_cumprod_prev|sqrt_alphas_cumprod|sqrt_one_minus_alphas_cumprod"
    r"|log_one_minus_alphas_cumprod|sqrt_recip_alphas_cumprod|sqrt_recipm1_alphas_cumprod"
    r"|posterior_variance|posterior_log_variance_clipped|posterior_mean_coef1|posterior_mean_coef2|logvar"
)


def table(config: CheckpointConfig, params: Mapping[str, Any]) -> Table:
    """The rules for one architecture; `params` as `unclip_jax.checkpoints.networks.abstract_params` gives them."""
    t = Table(params)
    _unet(t, config.unet)
    _vae(t, config.vae)
    open_clip.text_tower(t, TEXT, config.text_encoder.layers)
    if config.image_encoder is not None:
        open_clip.vision_tower(t, f"{VISION}.visual", config.image_encoder.layers)
    if config.depth_estimator is not None:
        depth.midas(t, DEPTH, config.depth_estimator)
    return t


def unused(config: CheckpointConfig) -> list[Unused]:
    """What an original file may hold that no network reads."""
    blocks = rf"{TEXT}\.transformer\.resblocks\.{config.text_encoder.layers}\..*"
    return [
        Unused(rf"(noise_augmentor\.|low_scale_model\.)?({SCHEDULE})", "noise schedule: recomputed from its betas"),
        Unused(blocks, "the last text block: the penultimate layer's states are used"),
        Unused(rf"{TEXT}\.(text_projection|logit_scale|attn_mask)", "not part of the hidden states' path"),
        Unused(r"embedder\.model\.(?!visual\.).*", "the image embedder's text half"),
        Unused(r"embedder\.model\.visual\.attn_mask|embedder\.(mean|std)", "constants"),
        Unused(rf"{DEPTH}\.pretrained\.model\.head\..*", "the depth estimator's backbone as a classifier"),
        Unused(r"model_ema\..*", "moving averages of the UNet's weights: read with --ema"),
        Unused(r"scale_factor", "the latents' scale: part of the configuration"),
    ]


def unet_blocks(config: UNetConfig) -> Iterator[tuple[str, str, str]]:
    """(kind, our module, the original's module) of every block, in the original's numbering."""
    number = 1
    for level, attention in enumerate(config.attention_levels):
        for i in range(config.layers_per_block):
            yield "resnet", f"down_blocks.{level}.resnets.{i}", f"input_blocks.{number}.0"
            if attention:
                yield "transformer", f"down_blocks.{level}.attentions.{i}", f"input_blocks.{number}.1"
            number += 1
        if level < len(config.attention_levels) - 1:
            yield "conv", f"down_blocks.{level}.resample", f"input_blocks.{number}.0.op"
            number += 1
    yield "resnet", "mid_block.resnets.0", "middle_block.0"
    yield "transformer", "mid_block.attentions.0", "middle_block.1"
    yield "resnet", "mid_block.resnets.1", "middle_block.2"
    number = 0
    for up, attention in enumerate(reversed(config.attention_levels)):
        for i in range(config.layers_per_block + 1):
            yield "resnet", f"up_blocks.{up}.resnets.{i}", f"output_blocks.{number}.0"
            if attention:
                yield "transformer", f"up_blocks.{up}.attentions.{i}", f"output_blocks.{number}.1"
            number += 1
        if up < len(config.attention_levels) - 1:
            # The upsampler is the last module of the level's last block: second where there is no transformer.
            yield "conv", f"up_blocks.{up}.resample", f"output_blocks.{number - 1}.{2 if attention else 1}.conv"


def _unet(t: Table, config: UNetConfig) -> None:
    names = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "class_embedding.linear_1": "label_emb.0.0",
        "class_embedding.linear_2": "label_emb.0.2",
        "class_embedding": "label_emb",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    inside = {"resnet": RESNET, "transformer": TRANSFORMER, "conv": {"": ""}}
    for kind, ours, theirs in unet_blocks(config):
        names |= {_join(ours, a): _join(theirs, b) for a, b in inside[kind].items()}
    for ours, theirs in names.items():
        t.module(f"unet.{ours}", f"{UNET}.{theirs}")


def _vae(t: Table, config: VAEConfig) -> None:
    levels = len(config.block_out_channels)
    names = {name: name for name in ("quant_conv", "post_quant_conv")}
    for half, blocks, down in (("encoder", "down_blocks", True), ("decoder", "up_blocks", False)):
        names |= {f"{half}.{n}": f"{half}.{m}" for n, m in (("conv_in", "conv_in"), ("conv_out", "conv_out"))}
        names[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        for i in range(levels):
            ours = f"{half}.{blocks}.{i}"
            theirs = f"{half}.down.{i}" if down else f"{half}.up.{levels - 1 - i}"
            for j in range(config.layers_per_block + (not down)):
                names |= {f"{ours}.resnets.{j}.{a}": f"{theirs}.block.{j}.{b}" for a, b in VAE_RESNET.items()}
            names[f"{ours}.resample"] = f"{theirs}.{'downsample' if down else 'upsample'}.conv"
        for j in range(2):
            names |= {
                f"{half}.mid_block.resnets.{j}.{a}": f"{half}.mid.block_{j + 1}.{b}" for a, b in VAE_RESNET.items()
            }
        names[f"{half}.mid_block.attention.norm"] = f"{half}.mid.attn_1.norm"
        for a, b in VAE_ATTENTION.items():
            t.module(f"vae.{half}.mid_block.attention.{a}", f"{VAE}.{half}.mid.attn_1.{b}", kernel="pointwise")
    for ours, theirs in names.items():
        t.module(f"vae.{ours}", f"{VAE}.{theirs}")


def _join(module: str, inner: str) -> str:
    return f"{module}.{inner}" if inner else module
