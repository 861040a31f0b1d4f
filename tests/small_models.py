"""Small checkpoints of random weights, of which a step of training takes milliseconds."""

import dataclasses

from convert.random import TINY, random_parameter
from unclip_jax.checkpoints import directory
from unclip_jax.checkpoints.checkpoint import Checkpoint
from unclip_jax.checkpoints.config import ClipConfig, EstimatorConfig
from unclip_jax.checkpoints.networks import abstract_params
from unclip_jax.conditioning.tokenizer import Tokenizer, open_clip_tokenizer_json
from unclip_jax.models.configs import DepthConfig, TextConfig, UNetConfig, VAEConfig, VisionConfig
from unclip_jax.reference import Reference
from unclip_jax.sampling.schedule import NoiseSchedule

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
    reference=Reference.DIFFUSERS,
    scheduler="ddim",
    preprocess="diffusers",
)


def write(config, folder, seed=0):
    """A checkpoint of random weights."""
    params = {name: random_parameter(name, spec.shape, seed) for name, spec in abstract_params(config).items()}
    length = config.text_encoder.context_length
    dialect = "open_clip" if isinstance(config, ClipConfig) else config.tokenizer_dialect
    tokenizer = Tokenizer.from_json(open_clip_tokenizer_json([]), dialect, length)
    directory.save(Checkpoint(config, tokenizer, params, "random"), folder)
    return folder


TEXT_TO_IMAGE = dataclasses.replace(
    SMALL,
    unet=dataclasses.replace(SMALL.unet, class_embedding=None, class_embedding_size=None),
    image_encoder=None,
    image_noising=None,
)
DEPTH = dataclasses.replace(
    TEXT_TO_IMAGE,
    unet=dataclasses.replace(TEXT_TO_IMAGE.unet, in_channels=5),
    depth_estimator=DepthConfig(
        image_size=64,
        stem_width=16,
        stage_widths=(32, 32, 32),
        stage_depths=(1, 1, 1),
        norm_groups=8,
        width=32,
        layers=2,
        heads=2,
        mlp_width=64,
        taps=(0, 1),
        reassemble_widths=(16, 16),
        fusion_width=16,
    ),
)
UPSCALE = dataclasses.replace(
    TEXT_TO_IMAGE,
    unet=dataclasses.replace(SMALL.unet, in_channels=7, class_embedding="table", class_embedding_size=1000),
    vae=dataclasses.replace(SMALL.vae, scaling_factor=0.08333),
    image_noising=NoiseSchedule(beta_schedule="scaled_linear"),
)
INPAINT = dataclasses.replace(TEXT_TO_IMAGE, unet=dataclasses.replace(TEXT_TO_IMAGE.unet, in_channels=9))
ESTIMATE = dataclasses.replace(
    TEXT_TO_IMAGE,
    unet=dataclasses.replace(TEXT_TO_IMAGE.unet, in_channels=8),
    trained_for="depth",
    estimator=EstimatorConfig(num_inference_steps=2, processing_resolution=16),
)
DIRECT = dataclasses.replace(
    ESTIMATE,
    unet=dataclasses.replace(SMALL.unet, class_embedding_size=4),
    estimator=EstimatorConfig(num_inference_steps=1, processing_resolution=16, direct=True),
)
INSTRUCT = dataclasses.replace(
    TEXT_TO_IMAGE, unet=dataclasses.replace(TEXT_TO_IMAGE.unet, in_channels=8), trained_for="instruct"
)
CLIP = ClipConfig(TEXT, VISION, "open_clip")
