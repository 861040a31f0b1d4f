"""The JSON files of a diffusers folder for one of our configurations: `convert.architecture.diffusers` in reverse."""

from typing import Any

from convert.architecture.diffusers import (
    CLIP_NORMALISATION,
    COMPONENTS,
    ESTIMATOR,
    PIPELINES,
    PRIOR_PIPELINE,
    TINY_VAE,
)
from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.models.configs import (
    AnyVAEConfig,
    AutoencoderTinyConfig,
    DepthConfig,
    TextConfig,
    UNetConfig,
    VisionConfig,
)
from unclip_jax.models.depth import PATCH
from unclip_jax.sampling.schedule import NoiseSchedule
from unclip_jax.sampling.solvers import scheduler_name

# Readers take a folder older than 0.9 for one with mistakes of that time, and correct them.
VERSION = "0.35.0"


def diffusers_configs(config: CheckpointConfig, dtype: str) -> dict[str, dict[str, Any]]:
    """Path within the folder -> content, for every JSON file except the tokenizer's. dtype: of the weights, for CLIP.

    Raises:
        ValueError: The checkpoint lacks a network that the folder needs.
    """
    encoder_less = config.task == "variations" and config.image_encoder is None
    pipeline, names = PRIOR_PIPELINE if encoder_less else PIPELINES[config.task]
    if config.direct:  # in the repository that has them
        pipeline = "LotusGPipeline" if config.reads_two_latents else "LotusDPipeline"
    if config.task == "depth-to-image" and config.depth_estimator is None:
        raise ValueError("a diffusers folder for depth-to-image needs a depth estimator; this checkpoint has none")
    scheduler_name(config.scheduler_config)  # raises where it names none that diffusers and we know
    index = {name: list(COMPONENTS[name]) for name in names}
    if config.task == "depth-to-image":
        index["feature_extractor"] = ["transformers", "DPTImageProcessor"]
    if isinstance(config.vae, AutoencoderTinyConfig):
        index["vae"] = ["diffusers", TINY_VAE]
    index["scheduler"] = ["diffusers", config.scheduler_config["_class_name"]]
    files: dict[str, dict[str, Any]] = {
        "model_index.json": {"_class_name": pipeline, "_diffusers_version": VERSION, **index, **_estimator(config)},
        "unet/config.json": _unet(config.unet),
        "vae/config.json": _vae(config.vae, config.unet.sample_size),
        "text_encoder/config.json": _text(config.text_encoder, dtype),
        "scheduler/scheduler_config.json": {"_diffusers_version": VERSION, **config.scheduler_config},
    }
    if config.image_encoder is not None:
        vision = config.image_encoder
        files |= {
            "image_encoder/config.json": _vision(vision, dtype),
            "feature_extractor/preprocessor_config.json": _clip_preprocessing(vision.image_size),
        }
    if config.image_embedding_dim is not None:
        files["image_normalizer/config.json"] = {
            "_class_name": "StableUnCLIPImageNormalizer",
            "_diffusers_version": VERSION,
            "embedding_dim": config.image_embedding_dim,
        }
    if config.depth_estimator is not None:
        files |= {
            "depth_estimator/config.json": _depth(config.depth_estimator, dtype),
            "feature_extractor/preprocessor_config.json": _depth_preprocessing(config.depth_estimator.image_size),
        }
    if config.image_noising is not None:
        name = "low_res_scheduler" if config.task == "upscale" else "image_noising_scheduler"
        files[f"{name}/scheduler_config.json"] = _noising(config.image_noising)
    return files


def _estimator(config: CheckpointConfig) -> dict[str, Any]:
    """What the index says of an estimator: only the keys that its class takes."""
    if config.estimator is None:
        return {}
    if config.direct:  # whose task its name tells
        ending = "-disparity" if config.estimator.prediction_type == "disparity" else ""
        return {"_name_or_path": f"lotus-{config.task}{ending}"}
    others = {"depth": ("use_full_z_range",), "normals": ("scale_invariant", "shift_invariant")}[config.task]
    said = {theirs: getattr(config.estimator, ours) for ours, (theirs, _) in ESTIMATOR.items() if theirs not in others}
    return said | {"prediction_type": config.estimator.prediction_type or config.task}


def _unet(config: UNetConfig) -> dict[str, Any]:
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": VERSION,
        **_encoder(config),
        "center_input_sample": False,
        "dual_cross_attention": False,
        "out_channels": config.out_channels,
        "sample_size": config.sample_size,
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention_levels)],
    }


def _encoder(config: UNetConfig) -> dict[str, Any]:
    """What the classes of UNets and ControlNets have in common."""
    return {
        "act_fn": "silu",
        "attention_head_dim": list(config.num_heads),  # a misnomer of diffusers: the number of heads
        "block_out_channels": list(config.block_out_channels),
        "class_embed_type": "projection" if config.class_embedding == "projection" else None,
        "cross_attention_dim": config.cross_attention_dim,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.attention_levels],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": config.in_channels,
        "layers_per_block": config.layers_per_block,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-5,
        "norm_num_groups": config.norm_groups,
        "num_class_embeds": config.class_embedding_size if config.class_embedding == "table" else None,
        "only_cross_attention": list(config.only_cross_attention),
        "projection_class_embeddings_input_dim": (
            config.class_embedding_size if config.class_embedding == "projection" else None
        ),
        "resnet_time_scale_shift": "default",
        "upcast_attention": True,
        "use_linear_projection": True,
    }


def tiny_vae_json(config: AutoencoderTinyConfig) -> dict[str, Any]:
    """diffusers' config.json for a tiny autoencoder."""
    return {
        "_class_name": TINY_VAE,
        "_diffusers_version": VERSION,
        "act_fn": "relu",
        "block_out_channels": list(config.block_out_channels),
        "decoder_block_out_channels": list(config.decoder_block_out_channels),
        "encoder_block_out_channels": list(config.encoder_block_out_channels),
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "latent_magnitude": config.latent_magnitude,
        "latent_shift": config.latent_shift,
        "num_decoder_blocks": list(config.num_decoder_blocks),
        "num_encoder_blocks": list(config.num_encoder_blocks),
        "out_channels": config.in_channels,
        "scaling_factor": config.scaling_factor,
        "shift_factor": 0.0,
        "upsample_fn": "nearest",
        "upsampling_scaling_factor": 2,
    }


def _vae(config: AnyVAEConfig, latent_size: int) -> dict[str, Any]:
    if isinstance(config, AutoencoderTinyConfig):
        return tiny_vae_json(config)
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": VERSION,
        "act_fn": "silu",
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_groups,
        "out_channels": config.in_channels,
        "sample_size": latent_size * config.factor,
        "scaling_factor": config.scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def _text(config: TextConfig, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,  # as published; the ids in use are the tokenizer's
        "hidden_act": config.activation,
        "hidden_size": config.width,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": config.mlp_width,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": config.context_length,
        "model_type": "clip_text_model",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "pad_token_id": 1,
        "projection_dim": config.projection_dim or 512,
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
    }


def _vision(config: VisionConfig, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "hidden_act": config.activation,
        "hidden_size": config.width,
        "image_size": config.image_size,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": config.mlp_width,
        "layer_norm_eps": 1e-5,
        "model_type": "clip_vision_model",
        "num_attention_heads": config.heads,
        "num_channels": 3,
        "num_hidden_layers": config.layers,
        "patch_size": config.patch_size,
        "projection_dim": config.projection_dim,
        "torch_dtype": dtype,
    }


def _clip_preprocessing(image_size: int) -> dict[str, Any]:
    return {
        "crop_size": {"height": image_size, "width": image_size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_processor_type": "CLIPImageProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": image_size},
        **CLIP_NORMALISATION,
    }


def _depth(config: DepthConfig, dtype: str) -> dict[str, Any]:
    side = config.image_size // PATCH
    return {
        "architectures": ["DPTForDepthEstimation"],
        "add_projection": False,
        "attention_probs_dropout_prob": 0.0,
        "auxiliary_loss_weight": 0.4,
        "backbone_config": {
            "depths": list(config.stage_depths),
            "embedding_dynamic_padding": True,
            "embedding_size": config.stem_width,
            "global_padding": "same",
            "hidden_sizes": [*config.stage_widths, 2 * config.stage_widths[-1]],
            "layer_type": "bottleneck",
            "model_type": "bit",
            "num_groups": config.norm_groups,
            "out_features": ["stage1", "stage2", "stage3"],
        },
        "backbone_featmap_shape": [1, config.stage_widths[-1], side, side],
        "backbone_out_indices": [2, 5, *config.taps],
        "fusion_hidden_size": config.fusion_width,
        "head_in_index": -1,
        "hidden_act": config.activation,
        "hidden_dropout_prob": 0.0,
        "hidden_size": config.width,
        "image_size": config.image_size,
        "initializer_range": 0.02,
        "intermediate_size": config.mlp_width,
        "is_hybrid": True,
        "layer_norm_eps": config.norm_epsilon,
        "model_type": "dpt",
        "neck_hidden_sizes": [*config.stage_widths[:2], *config.reassemble_widths],
        "neck_ignore_stages": [0, 1],
        "num_attention_heads": config.heads,
        "num_channels": 3,
        "num_hidden_layers": config.layers,
        "patch_size": PATCH,
        "qkv_bias": True,
        "readout_type": "project",
        "reassemble_factors": [1, 1, 1, 0.5],
        "torch_dtype": dtype,
        "use_auxiliary_head": True,
        "use_batch_norm_in_fusion_residual": False,
    }


def _depth_preprocessing(image_size: int) -> dict[str, Any]:
    return {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "ensure_multiple_of": 1,
        "feature_extractor_type": "DPTFeatureExtractor",
        "image_mean": [0.5] * 3,
        "image_processor_type": "DPTImageProcessor",
        "image_std": [0.5] * 3,
        "keep_aspect_ratio": False,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": image_size, "width": image_size},
    }


def _noising(schedule: NoiseSchedule) -> dict[str, Any]:
    return {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": VERSION,
        "beta_end": schedule.beta_end,
        "beta_schedule": schedule.beta_schedule,
        "beta_start": schedule.beta_start,
        "clip_sample": True,
        "num_train_timesteps": schedule.num_train_timesteps,
        "prediction_type": "epsilon",
        "trained_betas": None,
        "variance_type": "fixed_small",
    }
