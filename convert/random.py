"""Random checkpoints in the original's format, to try the library and to test it without real weights.

The file is made by the ldm table (for a prior, Karlo's) read backwards, so it has exactly the names, shapes and layouts
of a published file.
"""

import dataclasses
import functools
import math
import zlib
from pathlib import Path

import numpy as np
import yaml

from convert.architecture.presets import COSINE, PRESETS
from convert.architecture.prior import KARLO_SCHEDULER
from convert.engine import export_tensors
from convert.export.original_yaml import original_yaml
from convert.export.prior import save_karlo_prior
from convert.rules import ldm
from convert.statistics import STATISTICS
from unclip_jax.checkpoints.checkpoint import Checkpoint, Parameter
from unclip_jax.checkpoints.config import AnyConfig, CheckpointConfig, PriorCheckpointConfig
from unclip_jax.checkpoints.networks import abstract_params, is_stacked
from unclip_jax.checkpoints.stream import write_safetensors
from unclip_jax.conditioning.tokenizer import Tokenizer, openai_tokenizer_json
from unclip_jax.models.configs import PriorConfig, TextConfig, UNetConfig, VAEConfig, VisionConfig
from unclip_jax.reference import Reference
from unclip_jax.sampling.solvers import PUBLISHED_UNCLIP_SCHEDULER

_VISION = VisionConfig(width=80, layers=2, heads=4, mlp_width=320, projection_dim=48)
TINY = CheckpointConfig(
    unet=UNetConfig(
        block_out_channels=(32, 64, 128, 128),
        num_heads=(2, 4, 8, 8),
        cross_attention_dim=64,
        class_embedding="projection",
        class_embedding_size=2 * _VISION.projection_dim,
        sample_size=32,
    ),
    vae=VAEConfig(block_out_channels=(32, 64, 128, 128)),
    text_encoder=TextConfig(width=64, layers=2, heads=4, mlp_width=256),
    image_encoder=_VISION,
    reference=Reference.ORIGINAL,
    scheduler="ldm-ddim",
    scheduler_config=PUBLISHED_UNCLIP_SCHEDULER,
    image_noising=COSINE,
)


# The rest of the family, smaller still: a UNet of two levels, 64x64 images (the upscaler: 16x16 and more become four
# times as large). There is no small depth estimator in the original's format: the depth map is given.
_TEXT_TO_IMAGE = dataclasses.replace(
    TINY,
    unet=UNetConfig(
        block_out_channels=(32, 64),
        layers_per_block=1,
        attention_levels=(False, True),
        num_heads=(2, 4),
        cross_attention_dim=64,
        only_cross_attention=(False, False),
        sample_size=16,
    ),
    vae=VAEConfig(block_out_channels=(32, 32, 64), layers_per_block=1),
    image_encoder=None,
    scheduler_config=PRESETS["512-base"].scheduler_config,
    image_noising=None,
)
# Its embeddings have the width of the demo model's.
_PRIOR = PriorCheckpointConfig(
    PriorConfig(embedding_dim=192, width=128, layers=3, heads=4),
    TextConfig(width=192, layers=2, heads=3, mlp_width=384, activation="quick_gelu", projection_dim=192),
    Reference.ORIGINAL,
    KARLO_SCHEDULER,
)


def _of_channels(in_channels: int) -> CheckpointConfig:
    return dataclasses.replace(_TEXT_TO_IMAGE, unet=dataclasses.replace(_TEXT_TO_IMAGE.unet, in_channels=in_channels))


SMALL: dict[str, AnyConfig] = {
    "tiny": TINY,
    "tiny-text-to-image": _TEXT_TO_IMAGE,
    "tiny-depth": _of_channels(5),
    "tiny-inpainting": _of_channels(9),
    "tiny-upscaler": dataclasses.replace(
        _TEXT_TO_IMAGE,
        unet=dataclasses.replace(
            _TEXT_TO_IMAGE.unet, in_channels=7, class_embedding="table", class_embedding_size=1000
        ),
        scheduler_config=PRESETS["x4-upscaler"].scheduler_config,
        image_noising=PRESETS["x4-upscaler"].image_noising,
    ),
    "tiny-prior": _PRIOR,
}


def write_random_checkpoint(path: Path, preset: str = "tiny", seed: int = 0) -> tuple[Path, Path]:
    """Writes a `.safetensors` of random weights in the original's layout, and the original's yaml beside it.

    A prior's text tower and statistics are written beside it, where they are found.

    Args:
        path: The file to write.
        preset: A key of `SMALL` ("tiny" is an unCLIP of a few million parameters for 256x256 images; "tiny-prior" goes
            with the demo model), or a published checkpoint's name, at its full size.
        seed: Determines the weights.

    Returns:
        The two paths; the yaml is `<path>.yaml`.

    Raises:
        ValueError: The preset is unknown.
    """
    presets = {**SMALL, **PRESETS}
    if preset not in presets:
        raise ValueError(f"preset is {preset!r}; accepted: {', '.join(presets)}")
    config = presets[preset]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    params = {
        name: random_parameter(name, spec.shape, seed)
        for name, spec in abstract_params(config).items()
        if name not in STATISTICS
    }
    settings = path.with_name(f"{path.name}.yaml")
    if isinstance(config, PriorCheckpointConfig):
        width = config.prior.embedding_dim
        params |= {name: Parameter.of(np.full(width, name.endswith("std"), np.float32)) for name in STATISTICS}
        tokenizer = Tokenizer.from_json(openai_tokenizer_json(), config.tokenizer_dialect, config.prior.context_length)
        checkpoint = Checkpoint(config, tokenizer, params, "random")
        save_karlo_prior(checkpoint, path, dtype=None, progress=lambda nbytes: None)
        return path, settings
    assert isinstance(config, CheckpointConfig)
    partial = path.with_name(f".{path.name}.partial")
    write_safetensors(partial, export_tensors(ldm.table(config, params).rules, params), metadata={"format": "pt"})
    partial.replace(path)
    settings.write_text(yaml.safe_dump(original_yaml(config), sort_keys=False), "utf-8")
    return path, settings


def random_parameter(name: str, shape: tuple[int, ...], seed: int) -> Parameter:
    """A parameter determined by its name and the seed: about unit gain for kernels, scales near 1, small biases."""
    leaf = name.rsplit(".", 1)[-1]

    def draw(layer: int, shape: tuple[int, ...]) -> np.ndarray:
        noise = np.random.default_rng([seed, zlib.crc32(name.encode()), layer]).standard_normal(shape, np.float32)
        if leaf == "kernel":
            return noise / np.float32(math.sqrt(math.prod(shape[:-1])))
        if leaf == "scale":
            return 1 + np.float32(0.1) * noise
        return np.float32(0.05) * noise

    if not is_stacked(name):
        return Parameter(shape, np.dtype(np.float32), (lambda: draw(0, shape),))
    layers = (functools.partial(draw, layer, (1, *shape[1:])) for layer in range(shape[0]))
    return Parameter(shape, np.dtype(np.float32), tuple(layers))
