"""The architecture of the published prior."""

from convert.architecture.prior import KARLO_SCHEDULER
from unclip_jax.checkpoints.config import PriorCheckpointConfig
from unclip_jax.models.configs import PriorConfig, TextConfig

PUBLISHED = PriorCheckpointConfig(
    PriorConfig(),
    TextConfig(width=768, layers=12, heads=12, mlp_width=3072, activation="quick_gelu", projection_dim=768),
    "original",
    KARLO_SCHEDULER,
)
