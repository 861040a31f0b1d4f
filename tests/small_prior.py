"""A small prior with random weights, open as if from a file."""

import zlib

import numpy as np

from unclip_jax.checkpoints.checkpoint import Checkpoint, Parameter
from unclip_jax.checkpoints.config import PriorCheckpointConfig
from unclip_jax.checkpoints.networks import abstract_params
from unclip_jax.conditioning.tokenizer import Tokenizer, openai_tokenizer_json
from unclip_jax.models.configs import PriorConfig, TextConfig

SCHEDULER = {
    "_class_name": "UnCLIPScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "clip_sample": True,
    "clip_sample_range": 10.0,
    "num_train_timesteps": 1000,
    "prediction_type": "sample",
    "variance_type": "fixed_small_log",
}
CONFIG = PriorCheckpointConfig(
    PriorConfig(embedding_dim=64, width=48, layers=3, heads=4),
    TextConfig(width=64, layers=2, heads=1, mlp_width=128, activation="quick_gelu", projection_dim=64),
    "original",
    SCHEDULER,
)


def checkpoint(config: PriorCheckpointConfig = CONFIG) -> Checkpoint:
    params = {name: Parameter.of(_value(name, spec.shape)) for name, spec in abstract_params(config).items()}
    tokenizer = Tokenizer.from_json(openai_tokenizer_json(), config.tokenizer_dialect, config.prior.context_length)
    return Checkpoint(config, tokenizer, params, "random")


def _value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    if name.endswith("kernel"):
        return values / np.float32(shape[-2] ** 0.5)
    if name.endswith("scale") or name == "image_normalizer.std":
        return 1 + np.float32(0.1) * values
    return np.float32(0.1) * values
