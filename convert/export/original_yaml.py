"""The original's yaml for an architecture, from which its code, and ours with --config, builds the model."""

import dataclasses
from typing import Any

from convert.architecture.presets import COSINE
from unclip_jax.checkpoints.config import CheckpointConfig, Task
from unclip_jax.models.configs import AnyVAEConfig, DepthConfig, TextConfig, UNetConfig, VAEConfig, VisionConfig

ENCODERS = "ldm.modules.encoders.modules"
MODELS: dict[Task, str] = {
    "variations": "ImageEmbeddingConditionedLatentDiffusion",
    "text-to-image": "LatentDiffusion",
    "depth-to-image": "LatentDepth2ImageDiffusion",
    "upscale": "LatentUpscaleDiffusion",
    "inpaint": "LatentInpaintDiffusion",
}
CONDITIONING: dict[Task, str] = {
    "variations": "crossattn-adm",
    "text-to-image": "crossattn",
    "depth-to-image": "hybrid",
    "upscale": "hybrid-adm",
    "inpaint": "hybrid",
}
PARAMETERIZATIONS = {"epsilon": "eps", "v_prediction": "v"}


def original_yaml(config: CheckpointConfig) -> dict[str, Any]:
    """The yaml as plain data; towers are described inline, with open_clip's own mapping.

    Raises:
        ValueError: The original code cannot express a setting. The message names it.
    """
    if config.task == "variations" and config.image_encoder is None:
        raise ValueError("the original's unCLIP checkpoints need an image encoder; this checkpoint has none")
    if config.task not in MODELS:
        raise ValueError(f"the original code has no checkpoints for {config.task}; write a diffusers folder instead")
    prediction = config.scheduler_config.get("prediction_type", "epsilon")
    if prediction not in PARAMETERIZATIONS:
        raise ValueError(f"the original code has no prediction_type {prediction!r}")
    params = {
        "linear_start": config.scheduler_config.get("beta_start", 0.0001),
        "linear_end": config.scheduler_config.get("beta_end", 0.02),
        "timesteps": 1000,
        "image_size": config.unet.sample_size,
        "scale_factor": config.vae.scaling_factor,
        "parameterization": PARAMETERIZATIONS[prediction],
        "conditioning_key": CONDITIONING[config.task],
        "unet_config": _node("ldm.modules.diffusionmodules.openaimodel.UNetModel", _unet(config.unet)),
        "first_stage_config": _node("ldm.models.autoencoder.AutoencoderKL", _vae(config.vae)),
        "cond_stage_config": _node(f"{ENCODERS}.FrozenOpenCLIPEmbedder", _text(config.text_encoder)),
    }
    if config.image_encoder is not None:
        params |= _image_conditioning(config.image_encoder)
    elif config.task == "depth-to-image":
        params["depth_stage_config"] = _depth(config.depth_estimator)
    elif config.image_noising is not None:
        noising = {"linear_start": config.image_noising.beta_start, "linear_end": config.image_noising.beta_end}
        params["low_scale_config"] = _node(
            "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation",
            {"noise_schedule_config": noising, "max_noise_level": 350},
        )
    return {"model": _node(f"ldm.models.diffusion.ddpm.{MODELS[config.task]}", params)}


def _node(target: str, params: dict[str, Any]) -> dict[str, Any]:
    return {"target": target, "params": params}


def _unet(config: UNetConfig) -> dict[str, Any]:
    channels, heads = config.block_out_channels, config.num_heads
    widths = {c // n for c, n in zip(channels, heads, strict=True)}
    if len(widths) > 1 and len(set(heads)) > 1:
        raise ValueError(f"the original code has one number or one width of heads; UNetConfig.num_heads is {heads}")
    if any(c % channels[0] for c in channels) or config.norm_groups != 32:
        raise ValueError(
            f"the original code has multiples of the first of block_out_channels, {channels}, and norm_groups 32, "
            f"not {config.norm_groups}"
        )
    settings: dict[str, Any] = {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "model_channels": channels[0],
        "attention_resolutions": [2**level for level, attends in enumerate(config.attention_levels) if attends],
        "num_res_blocks": config.layers_per_block,
        "channel_mult": [c // channels[0] for c in channels],
        **({"num_head_channels": widths.pop()} if len(widths) == 1 else {"num_heads": heads[0]}),
        "use_spatial_transformer": True,
        "use_linear_in_transformer": True,
        "transformer_depth": 1,
        "context_dim": config.cross_attention_dim,
        "legacy": False,
    }
    if any(config.only_cross_attention):
        settings["disable_self_attentions"] = list(config.only_cross_attention)
    if config.class_embedding == "projection":
        settings |= {"num_classes": "sequential", "adm_in_channels": config.class_embedding_size}
    elif config.class_embedding == "table":
        settings["num_classes"] = config.class_embedding_size
    return settings


def _vae(config: AnyVAEConfig) -> dict[str, Any]:
    assert isinstance(config, VAEConfig)  # `save_original` refuses tiny ones
    channels = config.block_out_channels
    if any(c % channels[0] for c in channels) or config.norm_groups != 32:
        raise ValueError(
            f"the original code has multiples of the first of VAEConfig.block_out_channels, {channels}, and "
            f"norm_groups 32, not {config.norm_groups}"
        )
    return {
        "embed_dim": config.latent_channels,
        "ddconfig": {
            "double_z": True,
            "z_channels": config.latent_channels,
            "resolution": 256,
            "in_channels": config.in_channels,
            "out_ch": config.in_channels,
            "ch": channels[0],
            "ch_mult": [c // channels[0] for c in channels],
            "num_res_blocks": config.layers_per_block,
            "attn_resolutions": [],
            "dropout": 0.0,
        },
    }


def _text(config: TextConfig) -> dict[str, Any]:
    cfg = {
        "context_length": config.context_length,
        "vocab_size": config.vocab_size,
        "width": config.width,
        "heads": config.heads,
        "layers": config.layers + 1,  # the last one is not used
        **_mlp(config),
    }
    return {"arch": "inline", "model_cfg": {"text_cfg": cfg, **_activation(config)}, "layer": "penultimate"}


def _image_conditioning(config: VisionConfig) -> dict[str, Any]:
    """The two sections of an unCLIP yaml: the image encoder and the noise augmentation of what it gives."""
    if config.activation == "quick_gelu" and config.heads == config.width // 64:
        # OpenAI's towers go by their tensors' shapes, whatever is written here.
        embedder = _node(f"{ENCODERS}.ClipImageEmbedder", {"model": "ViT-L/14"})
    else:
        tower = {
            "image_size": config.image_size,
            "layers": config.layers,
            "width": config.width,
            "head_width": config.width // config.heads,
            "patch_size": config.patch_size,
            **_mlp(config),
        }
        cfg = {"embed_dim": config.projection_dim, "vision_cfg": tower, **_activation(config)}
        embedder = _node(f"{ENCODERS}.FrozenOpenCLIPImageEmbedder", {"arch": "inline", "model_cfg": cfg})
    augmentation = {
        "timestep_dim": config.projection_dim,
        "noise_schedule_config": {"timesteps": 1000, "beta_schedule": COSINE.beta_schedule},
    }
    return {
        "embedder_config": embedder,
        "noise_aug_config": _node(f"{ENCODERS}.CLIPEmbeddingNoiseAugmentation", augmentation),
    }


def _depth(config: DepthConfig | None) -> dict[str, Any]:
    if config is None:
        return _node("torch.nn.Identity", {})
    # The epsilon is transformers' at most: both are far below the variances that they are added to.
    if dataclasses.replace(config, norm_epsilon=DepthConfig.norm_epsilon) != DepthConfig():
        raise ValueError(f"the original code has one depth estimator, MiDaS' dpt_hybrid, {DepthConfig()}; not {config}")
    return _node("ldm.modules.midas.api.MiDaSInference", {"model_type": "dpt_hybrid"})


def _mlp(config: TextConfig | VisionConfig) -> dict[str, float]:
    return {} if config.mlp_width == 4 * config.width else {"mlp_ratio": config.mlp_width / config.width}


def _activation(config: TextConfig | VisionConfig) -> dict[str, bool]:
    return {"quick_gelu": True} if config.activation == "quick_gelu" else {}
