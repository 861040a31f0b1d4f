"""The architecture of the published prior."""

from convert.architecture.prior import KARLO_SCHEDULER
from unclip_jax.checkpoints.config import PriorCheckpointConfig
from unclip_jax.models.clip import TextConfig
from unclip_jax.models.prior import PriorConfig

PUBLISHED = PriorCheckpointConfig(
    PriorConfig(),
    TextConfig(width=768, layers=12, heads=12, mlp_width=3072, activation="quick_gelu", projection_dim=768),
    "original",
    KARLO_SCHEDULER,
)
