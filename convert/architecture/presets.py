"""The architectures of the published checkpoints, and recognising them by their tensors."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import NamedTuple

from convert import layouts
from convert.engine import Report, check
from convert.layouts import Places
from convert.readers import TensorInfo
from unclip_jax.checkpoints.config import TASKS, CheckpointConfig
from unclip_jax.models.configs import DepthConfig, TextConfig, UNetConfig, VAEConfig, VisionConfig
from unclip_jax.reference import Reference
from unclip_jax.sampling.schedule import NoiseSchedule
from unclip_jax.sampling.solvers import PUBLISHED_UNCLIP_SCHEDULER

# Image embeddings are noised by the cosine schedule (Nichol & Dhariwal 2021, arXiv:2102.09672) in both dialects.
COSINE = NoiseSchedule(beta_schedule="squaredcos_cap_v2")

VIT_H = VisionConfig()
VIT_L = VisionConfig(width=1024, layers=24, heads=16, mlp_width=4096, activation="quick_gelu", projection_dim=768)


def unclip(vision: VisionConfig) -> CheckpointConfig:
    """Stable Diffusion 2.1 unCLIP as Stability published it, for one of its two image encoders."""
    return CheckpointConfig(
        unet=UNetConfig(class_embedding="projection", class_embedding_size=2 * vision.projection_dim),
        vae=VAEConfig(),
        text_encoder=TextConfig(),
        image_encoder=vision,
        reference=Reference.ORIGINAL,
        scheduler="ldm-ddim",
        scheduler_config=PUBLISHED_UNCLIP_SCHEDULER,
        image_noising=COSINE,
    )


def published(
    prediction_type: str, sample_size: int, *, in_channels: int = 4, depth_estimator: DepthConfig | None = None
) -> CheckpointConfig:
    """Stable Diffusion 2 without an image encoder."""
    kind = "DDIMScheduler" if prediction_type == "v_prediction" else "PNDMScheduler"
    return CheckpointConfig(
        unet=UNetConfig(in_channels=in_channels, sample_size=sample_size),
        vae=VAEConfig(),
        text_encoder=TextConfig(),
        image_encoder=None,
        reference=Reference.ORIGINAL,
        scheduler="ldm-ddim",
        scheduler_config={**PUBLISHED_UNCLIP_SCHEDULER, "_class_name": kind, "prediction_type": prediction_type},
        depth_estimator=depth_estimator,
    )


UPSCALER = CheckpointConfig(
    unet=UNetConfig(
        in_channels=7,
        block_out_channels=(256, 512, 512, 1024),
        attention_levels=(False, True, True, True),
        num_heads=(8, 8, 8, 8),
        only_cross_attention=(True, True, True, False),
        class_embedding="table",
        class_embedding_size=1000,
        sample_size=128,
    ),
    vae=VAEConfig(block_out_channels=(128, 256, 512), scaling_factor=0.08333),
    text_encoder=TextConfig(),
    image_encoder=None,
    reference=Reference.ORIGINAL,
    scheduler="ldm-ddim",
    scheduler_config={
        **PUBLISHED_UNCLIP_SCHEDULER,
        "_class_name": "DDIMScheduler",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "prediction_type": "v_prediction",
    },
    # What the original calls a linear schedule is linear in the square root of beta.
    image_noising=NoiseSchedule(beta_schedule="scaled_linear", beta_start=0.0001, beta_end=0.02),
)

# Under the names of the files that Stability published, without "-ema".
PRESETS = {
    "sd21-unclip-h": unclip(VIT_H),
    "sd21-unclip-l": unclip(VIT_L),
    "768-v": published("v_prediction", 96),
    "512-base": published("epsilon", 64),
    "512-depth": published("epsilon", 64, in_channels=5, depth_estimator=DepthConfig()),
    "512-inpainting": published("epsilon", 64, in_channels=9),
    "x4-upscaler": UPSCALER,
}


def look_alikes(tensors: Mapping[str, TensorInfo], places: Places, without: Collection[str] = ()) -> dict[str, Report]:
    """The `candidates` for these tensors, with the findings of `check`.

    Several are complete if their tensors are the same, as with 512-base and 768-v.

    Args:
        tensors: As from `convert.layouts.locate`.
        places: As from `convert.layouts.locate`.
        without: Parts that need not be there.

    Returns:
        name -> findings.
    """
    reports = {}
    for name, config in candidates(tensors, places).items():
        params = layouts.file_params(config, without)
        rules = layouts.table(config, params, places).rules
        reports[name] = check(rules, params, tensors, layouts.unused(config, places, without))
    return reports


def candidates(tensors: Mapping[str, TensorInfo], places: Places) -> dict[str, CheckpointConfig]:
    """The published checkpoints whose UNet has this one's ends, or all of them, by name.

    Where it reads more channels than any, those for text to image with so many: such a file can be described. tensors,
    places: as from `convert.layouts.locate`.
    """
    # A table takes most of a second to build, and these shapes tell most checkpoints apart.
    ends = unet_ends(tensors, places)
    alike = {name: config for name, config in PRESETS.items() if ends == unet_ends_of(config.unet)}
    if alike or ends is None or ends.in_channels in TASKS:
        return alike or PRESETS
    wider = {
        name: dataclasses.replace(config, unet=dataclasses.replace(config.unet, in_channels=ends.in_channels))
        for name, config in PRESETS.items()
        if config.task == "text-to-image"
    }
    return {name: config for name, config in wider.items() if ends == unet_ends_of(config.unet)} or PRESETS


class UNetEnds(NamedTuple):
    """What the first layers of a UNet show about it. labels: the inputs of the class embedding, 0 without one."""

    in_channels: int
    width: int
    labels: int


def unet_ends(tensors: Mapping[str, TensorInfo], places: Places) -> UNetEnds | None:
    """The ends of the UNet among these tensors; None where there is none."""
    axes = {"conv_in.kernel": 4, "class_embedding.linear_1.kernel": 2, "class_embedding.embedding": 2}
    names = layouts.foreign_names("unet", places, axes)
    first, labels, rows = (tensors[names[ours]].shape if names[ours] in tensors else () for ours in axes)
    if len(first) != 4:
        return None
    return UNetEnds(first[1], first[0], labels[1] if len(labels) == 2 else rows[0] if len(rows) == 2 else 0)


def unet_ends_of(config: UNetConfig) -> UNetEnds:
    """The ends of a UNet of this architecture."""
    return UNetEnds(config.in_channels, config.block_out_channels[0], config.class_embedding_size or 0)
