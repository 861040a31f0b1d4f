"""The published checkpoints' architectures, and recognising one of them by its tensors alone."""

from collections.abc import Mapping

from convert.engine import Report, check
from convert.readers import CheckpointError, TensorInfo
from convert.rules import ldm
from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.checkpoints.networks import abstract_params
from unclip_jax.models.clip import TextConfig, VisionConfig
from unclip_jax.models.depth import DepthConfig
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
        dialect="original",
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
    dialect="original",
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


class Ambiguous(CheckpointError):
    """Tensors that are those of several published checkpoints; `names` says which."""

    def __init__(self, where: str, names: list[str]):
        self.names = names
        super().__init__(
            f"{where}: its tensors are the same in {' and '.join(names)}, which differ in what the network predicts; "
            f"say which one it is: --config {' or --config '.join(names)}, or its yaml"
        )


def from_inventory(tensors: Mapping[str, TensorInfo], where: str) -> CheckpointConfig:
    """The published checkpoint that these tensors are.

    Raises CheckpointError, naming the nearest one's differences, when they are none's; `Ambiguous` when several have
    these very tensors.
    """
    reports: dict[str, Report] = {}
    # A table takes most of a second to build, and these shapes tell most checkpoints apart.
    alike = {name: config for name, config in PRESETS.items() if _resembles(config, tensors)}
    for name, config in (alike or PRESETS).items():
        params = abstract_params(config)
        reports[name] = check(ldm.table(config, params).rules, params, tensors, ldm.unused(config))
    complete = [name for name, report in reports.items() if report.complete]
    if len(complete) > 1:
        raise Ambiguous(where, complete)
    if complete:
        return PRESETS[complete[0]]
    nearest = min(reports, key=lambda n: len(reports[n].missing) + len(reports[n].misshapen) + len(reports[n].unknown))
    raise CheckpointError(
        f"{where}: its tensors are no published checkpoint's ({', '.join(PRESETS)}), and no --config was given; "
        f"against {nearest}: {reports[nearest]}"
    )


def _resembles(config: CheckpointConfig, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether the UNet's first layer and the image encoder's last have the shapes of this architecture."""
    first = tensors.get(f"{ldm.UNET}.input_blocks.0.0.weight")
    last = tensors.get(f"{ldm.VISION}.visual.proj")
    unet, vision = config.unet, config.image_encoder
    return (first and first.shape[:2]) == (unet.block_out_channels[0], unet.in_channels) and (last and last.shape) == (
        vision and (vision.width, vision.projection_dim)
    )
