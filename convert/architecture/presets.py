"""The published checkpoints' architectures, and recognising one of them by its tensors alone."""

from collections.abc import Mapping
from typing import Any

from convert.engine import check
from convert.readers import CheckpointError, TensorInfo
from convert.rules import ldm
from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.checkpoints.networks import abstract_params
from unclip_jax.models.clip import TextConfig, VisionConfig
from unclip_jax.models.unet import UNetConfig
from unclip_jax.models.vae import VAEConfig
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
        dialect="original",
        scheduler="ldm-ddim",
        scheduler_config=PUBLISHED_UNCLIP_SCHEDULER,
        image_noising=COSINE,
    )


PRESETS = {"sd21-unclip-h": unclip(VIT_H), "sd21-unclip-l": unclip(VIT_L)}


def from_inventory(tensors: Mapping[str, TensorInfo], where: str) -> CheckpointConfig:
    """The published checkpoint that these tensors are. Raises CheckpointError, naming the nearest one's differences."""
    reports: dict[str, Any] = {}
    for name, config in PRESETS.items():
        params = abstract_params(config)
        reports[name] = check(ldm.table(config, params).rules, params, tensors, ldm.unused(config))
        if reports[name].complete:
            return config
    nearest = min(reports, key=lambda n: len(reports[n].missing) + len(reports[n].misshapen) + len(reports[n].unknown))
    raise CheckpointError(
        f"{where}: its tensors are no published checkpoint's ({', '.join(PRESETS)}), and no --config was given; "
        f"against {nearest}: {reports[nearest]}"
    )
