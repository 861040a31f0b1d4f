"""Small checkpoints that a difference is added to."""

import dataclasses

import numpy as np

from convert.architecture.presets import COSINE
from convert.random import SMALL, TINY, random_parameter
from unclip_jax.checkpoints.checkpoint import Checkpoint, Parameter
from unclip_jax.checkpoints.networks import abstract_params
from unclip_jax.conditioning.tokenizer import Tokenizer, clip_tokenizer_json

BASE = SMALL["tiny-text-to-image"]


UNCLIP = dataclasses.replace(
    BASE,
    unet=dataclasses.replace(BASE.unet, class_embedding="projection", class_embedding_size=96),
    image_encoder=TINY.image_encoder,
    image_noising=COSINE,
)


INPAINTING = SMALL["tiny-inpainting"]


STATISTICS = {"image_normalizer.mean", "image_normalizer.std"}


def make(config, seed, dtype=np.float32):
    """A checkpoint of random weights in memory. The statistics of an unCLIP's embeddings are 0 and 1."""
    params = {}
    for name, spec in abstract_params(config).items():
        array = random_parameter(name, spec.shape, seed).read()
        array = np.full(spec.shape, name.endswith("std"), np.float32) if name in STATISTICS else array
        params[name] = Parameter.of(array.astype(dtype))
    tokenizer = Tokenizer.from_json(clip_tokenizer_json(), "open_clip")
    return Checkpoint(config, tokenizer, params, f"seed {seed}")
