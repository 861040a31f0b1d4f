"""Small models and a few pictures to train on."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from convert.random import TINY, _random
from unclip_jax.checkpoints import directory
from unclip_jax.checkpoints.checkpoint import Checkpoint
from unclip_jax.checkpoints.config import ClipConfig
from unclip_jax.checkpoints.networks import abstract_params
from unclip_jax.conditioning.tokenizer import Tokenizer, open_clip_tokenizer_json
from unclip_jax.models.clip import TextConfig, VisionConfig
from unclip_jax.models.unet import UNetConfig
from unclip_jax.models.vae import VAEConfig

NAMES = ("red circle", "blue square", "green circle", "yellow square")
COLOURS = ((220, 40, 40), (40, 40, 220), (40, 180, 40), (230, 210, 40))

VISION = VisionConfig(32, 8, width=32, layers=1, heads=2, mlp_width=64, projection_dim=16)
TEXT = TextConfig(514, 16, width=32, layers=1, heads=2, mlp_width=64, projection_dim=16)
SMALL = dataclasses.replace(
    TINY,
    unet=UNetConfig(
        block_out_channels=(32, 32),
        layers_per_block=1,
        attention_levels=(False, True),
        num_heads=(1, 2),
        cross_attention_dim=32,
        only_cross_attention=(False, False),
        class_embedding="projection",
        class_embedding_size=32,
        norm_groups=8,
        sample_size=8,
    ),
    vae=VAEConfig(block_out_channels=(16, 16), layers_per_block=1, norm_groups=4),
    text_encoder=TEXT,
    image_encoder=VISION,
    dialect="diffusers",
    scheduler="ddim",
    preprocess="diffusers",
)


def write(config, folder):
    """A checkpoint of random weights."""
    params = {name: _random(name, spec.shape, 0) for name, spec in abstract_params(config).items()}
    length = config.text_encoder.context_length
    dialect = "open_clip" if isinstance(config, ClipConfig) else config.tokenizer_dialect
    tokenizer = Tokenizer.from_json(open_clip_tokenizer_json([]), dialect, length)
    directory.save(Checkpoint(config, tokenizer, params, "random"), folder)
    return folder


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """A checkpoint of the family with 16x16 pictures and 8x8 latents; not to be written to."""
    return write(SMALL, tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="session")
def small_text_model(tmp_path_factory):
    """The same without an image encoder."""
    unet = dataclasses.replace(SMALL.unet, class_embedding=None, class_embedding_size=None)
    config = dataclasses.replace(SMALL, unet=unet, image_encoder=None, image_noising=None)
    return write(config, tmp_path_factory.mktemp("models") / "text")


@pytest.fixture(scope="session")
def small_clip(tmp_path_factory):
    return write(ClipConfig(TEXT, VISION, "open_clip"), tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Sixteen pictures of four things, with captions; not to be written to."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32]
    with (folder / "metadata.jsonl").open("w") as file:
        for number in range(16):
            kind = number % 4
            inside = (np.hypot(x - 16, y - 16) < 11) if kind % 2 == 0 else (np.maximum(abs(x - 16), abs(y - 16)) < 10)
            picture = np.where(inside[..., None], COLOURS[kind], 255) + rng.integers(-12, 12, (32, 32, 3))
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"{number:02d}.png")
            row = {"file_name": f"{number:02d}.png", "text": NAMES[kind], "p_unsafe": number / 16}
            file.write(json.dumps(row) + "\n")
    return folder
