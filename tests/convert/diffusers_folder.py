"""A small diffusers folder written by hand, the way `save_pretrained` leaves one: for the tests of the converter."""

import json
import math

import numpy as np
from safetensors.numpy import save_file

from convert.engine import export_tensors
from convert.rules import diffusers
from unclip_jax.checkpoints.checkpoint import Parameter
from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.checkpoints.networks import abstract_params
from unclip_jax.conditioning.tokenizer import clip_tokenizer_json
from unclip_jax.models.configs import TextConfig, UNetConfig, VAEConfig, VisionConfig
from unclip_jax.reference import Reference
from unclip_jax.sampling.schedule import NoiseSchedule
from unclip_jax.sampling.solvers import PUBLISHED_UNCLIP_SCHEDULER

# What the files below describe.
CONFIG = CheckpointConfig(
    unet=UNetConfig(
        block_out_channels=(32, 64),
        layers_per_block=1,
        attention_levels=(True, False),
        num_heads=(2, 4),
        cross_attention_dim=16,
        only_cross_attention=(False, False),
        class_embedding="projection",
        class_embedding_size=16,
        norm_groups=8,
        sample_size=8,
    ),
    vae=VAEConfig(block_out_channels=(16, 32), layers_per_block=1, norm_groups=8),
    text_encoder=TextConfig(width=16, layers=2, heads=2, mlp_width=32),
    image_encoder=VisionConfig(
        image_size=56, width=16, layers=2, heads=2, mlp_width=32, activation="quick_gelu", projection_dim=8
    ),
    reference=Reference.DIFFUSERS,
    scheduler="pndm",
    scheduler_config=PUBLISHED_UNCLIP_SCHEDULER,
    preprocess="diffusers",
    image_noising=NoiseSchedule(beta_schedule="squaredcos_cap_v2"),
)

CLASSES = {
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "image_normalizer": ["stable_diffusion", "StableUnCLIPImageNormalizer"],
    "image_noising_scheduler": ["diffusers", "DDPMScheduler"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
FILES = {
    "model_index.json": {"_class_name": "StableUnCLIPImg2ImgPipeline", "_diffusers_version": "0.15.0", **CLASSES},
    "unet/config.json": {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": [2, 4],  # a misnomer: the number of heads
        "block_out_channels": [32, 64],
        "class_embed_type": "projection",
        "cross_attention_dim": 16,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "only_cross_attention": False,
        "projection_class_embeddings_input_dim": 16,
        "sample_size": 8,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "upcast_attention": True,
        "use_linear_projection": True,
    },
    "vae/config.json": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [16, 32],
        "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
        "norm_num_groups": 8,
        "sample_size": 16,
        "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
    },
    "text_encoder/config.json": {
        "hidden_act": "gelu",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 49408,
    },
    "image_encoder/config.json": {
        "hidden_act": "quick_gelu",
        "hidden_size": 16,
        "image_size": 56,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "patch_size": 14,
        "projection_dim": 8,
    },
    "image_normalizer/config.json": {"_class_name": "StableUnCLIPImageNormalizer", "embedding_dim": 8},
    "image_noising_scheduler/scheduler_config.json": {
        "_class_name": "DDPMScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "num_train_timesteps": 1000,
    },
    "feature_extractor/preprocessor_config.json": {
        "crop_size": {"height": 56, "width": 56},
        "do_center_crop": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": {"shortest_edge": 56},
    },
    "scheduler/scheduler_config.json": PUBLISHED_UNCLIP_SCHEDULER,
}


def write_json(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), "utf-8")


def write_configs(folder, changes=None):
    """Writes every JSON file. changes: (file, key) -> the value it has instead; `...` leaves the key out."""
    for name, data in FILES.items():
        edited = {**data, **{key: value for (file, key), value in (changes or {}).items() if file == name}}
        write_json(folder / name, {key: value for key, value in edited.items() if value is not ...})
    return folder


def random_tensors(config=CONFIG):
    """Component -> its random tensors under diffusers' names, statistics of the embeddings included."""
    generator = np.random.default_rng(0)

    def draw(name, shape):
        noise = generator.standard_normal(shape, np.float32) / np.float32(math.sqrt(math.prod(shape[:-1])))
        return np.abs(noise) + np.float32(1) if name == "image_normalizer.std" else noise

    params = {}
    for name, spec in abstract_params(config).items():
        array = draw(name, spec.shape)
        params[name] = Parameter.of(array)
    components = {}
    for name, tensor in export_tensors(diffusers.table(config, params).rules, params).items():
        component, _, tensor_name = name.partition("/")
        components.setdefault(component, {})[tensor_name] = np.ascontiguousarray(tensor.read())
    return components


def weights_name(component, variant=None):
    stem = "model" if component.endswith("_encoder") else "diffusion_pytorch_model"
    return f"{stem}{f'.{variant}' if variant else ''}.safetensors"


def write_folder(folder, tensors):
    """Writes the whole folder: configurations, tokenizer and these weights."""
    write_configs(folder)
    write_tokenizer(folder / "tokenizer")
    for component, arrays in tensors.items():
        save_file(arrays, folder / component / weights_name(component))
    return folder


def write_tokenizer(folder):
    """CLIP's vocabulary in transformers' files."""
    folder.mkdir()
    vocabulary = json.loads(clip_tokenizer_json())["model"]
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    words = {names.get(token, token): index for token, index in vocabulary["vocab"].items()}
    write_json(folder / "vocab.json", words)
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in vocabulary["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges), "utf-8")
    write_json(folder / "special_tokens_map.json", {"pad_token": "!"})
    return folder
