"""Random checkpoints in the original's format: for trying the library out, and for tests, where real weights are not.

The file is made by the ldm table read backwards, so it has the very names, shapes and layouts of a published file.
"""

import functools
import math
import zlib
from pathlib import Path

import numpy as np
import yaml

from convert.architecture.presets import COSINE, PRESETS
from convert.engine import export_tensors
from convert.export.original_yaml import original_yaml
from convert.rules import ldm
from unclip_jax.checkpoints.checkpoint import Parameter
from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.checkpoints.networks import abstract_params, is_stacked
from unclip_jax.checkpoints.stream import write_safetensors
from unclip_jax.models.clip import TextConfig, VisionConfig
from unclip_jax.models.unet import UNetConfig
from unclip_jax.models.vae import VAEConfig
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
    dialect="original",
    scheduler="ldm-ddim",
    scheduler_config=PUBLISHED_UNCLIP_SCHEDULER,
    image_noising=COSINE,
)


def write_random_checkpoint(path: Path, preset: str = "tiny", seed: int = 0) -> tuple[Path, Path]:
    """Writes a `.safetensors` of random weights in the original's layout, and the original's yaml beside it.

    preset: "tiny" (a few million parameters, 256x256 pictures) or a published checkpoint's name at its full size.
    Returns the two paths; the yaml is `<path>.yaml`. Raises ValueError for an unknown preset.
    """
    presets = {"tiny": TINY, **PRESETS}
    if preset not in presets:
        raise ValueError(f"preset is {preset!r}; accepted: {', '.join(presets)}")
    config = presets[preset]
    params = {
        name: _random(name, spec.shape, seed)
        for name, spec in abstract_params(config).items()
        if not name.startswith("image_normalizer.")
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    write_safetensors(partial, export_tensors(ldm.table(config, params).rules, params), metadata={"format": "pt"})
    partial.replace(path)
    settings = path.with_name(f"{path.name}.yaml")
    settings.write_text(yaml.safe_dump(original_yaml(config), sort_keys=False), "utf-8")
    return path, settings


def _random(name: str, shape: tuple[int, ...], seed: int) -> Parameter:
    """A parameter by its name and the seed alone: about unit gain for kernels, scales near 1, small biases."""
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
