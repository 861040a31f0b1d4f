"""A small CLIP model and its description in open_clip's form."""

from unclip_jax.checkpoints.config import ClipConfig
from unclip_jax.models.configs import TextConfig, VisionConfig

CONFIG = ClipConfig(
    TextConfig(width=64, layers=2, heads=1, mlp_width=256, projection_dim=24, vocab_size=49408),
    VisionConfig(image_size=28, width=64, layers=2, heads=1, mlp_width=256, projection_dim=24),
    "open_clip",
)


DESCRIPTION = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 64, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}
