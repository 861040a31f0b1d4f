"""Random checkpoints in the original's format: for trying the library out, and for tests, where real weights are not.

The file is made by the ldm table read backwards, so it has the very names, shapes and layouts of a published file.
"""

import json
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from convert.architecture.presets import COSINE, PRESETS
from convert.engine import export_tensors
from convert.rules import ldm
from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.checkpoints.networks import abstract_params
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
    params = {n: s for n, s in abstract_params(config).items() if not n.startswith("image_normalizer.")}
    tensors = export_tensors(
        ldm.table(config, params).rules, params, lambda name: _random(name, params[name].shape, seed)
    )
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, _) in tensors.items():
        end = offset + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for _, make in tensors.values():
            file.write(make().tobytes())
    partial.replace(path)
    settings = path.with_name(f"{path.name}.yaml")
    settings.write_text(yaml.safe_dump(original_yaml(config), sort_keys=False), "utf-8")
    return path, settings


def original_yaml(config: CheckpointConfig) -> dict[str, Any]:
    """The original repository's description of a checkpoint whose towers are open_clip's; the vision tower's inline."""
    unet, vae, text, vision = config.unet, config.vae, config.text_encoder, config.image_encoder
    if vision is None or vision.activation != "gelu":
        raise ValueError("only unCLIP checkpoints with an open_clip image encoder have a yaml of this form")
    towers = {
        "embed_dim": vision.projection_dim,
        "vision_cfg": {
            "image_size": vision.image_size,
            "layers": vision.layers,
            "width": vision.width,
            "head_width": vision.width // vision.heads,
            "patch_size": vision.patch_size,
        },
        "text_cfg": {
            "context_length": text.context_length,
            "vocab_size": text.vocab_size,
            "width": text.width,
            "heads": text.heads,
            "layers": text.layers + 1,  # the last one is not used
        },
    }
    encoders, diffusion = "ldm.modules.encoders.modules", "ldm.modules.diffusionmodules.openaimodel"
    levels = range(len(unet.block_out_channels))
    unet_config = {
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "model_channels": unet.block_out_channels[0],
        "attention_resolutions": [2**level for level in levels if unet.attention_levels[level]],
        "num_res_blocks": unet.layers_per_block,
        "channel_mult": [c // unet.block_out_channels[0] for c in unet.block_out_channels],
        "num_head_channels": unet.block_out_channels[0] // unet.num_heads[0],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": True,
        "transformer_depth": 1,
        "context_dim": unet.cross_attention_dim,
        "legacy": False,
        "num_classes": "sequential",
        "adm_in_channels": unet.class_embedding_size,
    }
    autoencoder = {
        "double_z": True,
        "z_channels": vae.latent_channels,
        "resolution": 256,
        "in_channels": vae.in_channels,
        "out_ch": vae.in_channels,
        "ch": vae.block_out_channels[0],
        "ch_mult": [c // vae.block_out_channels[0] for c in vae.block_out_channels],
        "num_res_blocks": vae.layers_per_block,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    # Copies, since yaml would write a second reference to the same mapping as an alias.
    tower = {"arch": "inline", "model_cfg": json.loads(json.dumps(towers))}
    return {
        "model": {
            "target": "ldm.models.diffusion.ddpm.ImageEmbeddingConditionedLatentDiffusion",
            "params": {
                "linear_start": config.scheduler_config["beta_start"],
                "linear_end": config.scheduler_config["beta_end"],
                "timesteps": 1000,
                "image_size": unet.sample_size,
                "scale_factor": vae.scaling_factor,
                "parameterization": "v",
                "conditioning_key": "crossattn-adm",
                "embedder_config": {"target": f"{encoders}.FrozenOpenCLIPImageEmbedder", "params": tower},
                "noise_aug_config": {
                    "target": f"{encoders}.CLIPEmbeddingNoiseAugmentation",
                    "params": {
                        "timestep_dim": vision.projection_dim,
                        "noise_schedule_config": {"timesteps": 1000, "beta_schedule": COSINE.beta_schedule},
                    },
                },
                "unet_config": {"target": f"{diffusion}.UNetModel", "params": unet_config},
                "first_stage_config": {
                    "target": "ldm.models.autoencoder.AutoencoderKL",
                    "params": {"embed_dim": vae.latent_channels, "ddconfig": autoencoder},
                },
                "cond_stage_config": {
                    "target": f"{encoders}.FrozenOpenCLIPEmbedder",
                    "params": {
                        "arch": "inline",
                        "model_cfg": json.loads(json.dumps(towers)),
                        "layer": "penultimate",
                    },
                },
            },
        }
    }


def _random(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """A parameter by its name and the seed alone: about unit gain for kernels, scales near 1, small biases."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    leaf = name.rsplit(".", 1)[-1]
    noise = rng.standard_normal(shape, np.float32)
    if leaf == "kernel":
        stacked = ".layers." in name
        return noise / np.float32(math.sqrt(math.prod(shape[stacked:-1])))
    if leaf == "scale":
        return 1 + np.float32(0.1) * noise
    return np.float32(0.05) * noise
