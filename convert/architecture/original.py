"""Reads an architecture from one of the original repository's yaml files, as data.

The original imports and calls whatever a yaml names as `target`. Here every target and every parameter is looked up in
a fixed table, and anything else is refused by name.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from convert.architecture.presets import COSINE, VIT_H, VIT_L
from convert.layouts import Places, foreign_names
from convert.readers import CheckpointError, TensorInfo
from convert.rules import ldm
from unclip_jax.checkpoints.config import TASKS, CheckpointConfig, ClipConfig
from unclip_jax.models.configs import DepthConfig, TextConfig, UNetConfig, VAEConfig, VisionConfig
from unclip_jax.reference import Reference
from unclip_jax.sampling.schedule import NoiseSchedule
from unclip_jax.sampling.solvers import PUBLISHED_UNCLIP_SCHEDULER

# Targets by the part of the model they may stand for. Names only: nothing is imported.
MODELS = {
    "ldm.models.diffusion.ddpm.ImageEmbeddingConditionedLatentDiffusion": "variations",
    "ldm.models.diffusion.ddpm.LatentDiffusion": "text-to-image",
    "ldm.models.diffusion.ddpm.LatentDepth2ImageDiffusion": "depth-to-image",
    "ldm.models.diffusion.ddpm.LatentUpscaleDiffusion": "upscale",
    "ldm.models.diffusion.ddpm.LatentInpaintDiffusion": "inpaint",
}
UNET = ("ldm.modules.diffusionmodules.openaimodel.UNetModel",)
AUTOENCODER = ("ldm.models.autoencoder.AutoencoderKL", "ldm.models.autoencoder.AutoencoderKLInferenceWrapper")
TEXT = ("ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",)
OPENCLIP_IMAGE = ("ldm.modules.encoders.modules.FrozenOpenCLIPImageEmbedder",)
OPENAI_IMAGE = ("ldm.modules.encoders.modules.ClipImageEmbedder",)
NOISE_AUGMENTATION = ("ldm.modules.encoders.modules.CLIPEmbeddingNoiseAugmentation",)
DEPTH = ("ldm.modules.midas.api.MiDaSInference",)
NOTHING = ("torch.nn.Identity",)
LOW_SCALE = ("ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation",)

# open_clip's own description of the towers that the published yaml files name.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "ViT-H-14": {
        "embed_dim": VIT_H.projection_dim,
        "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
    },
    "ViT-L/14": {
        "embed_dim": VIT_L.projection_dim,
        "vision_cfg": {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12},
    },
}

MAX_YAML_DEPTH = 50
_OPENING = (
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
)
_CLOSING = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)
MAX_YAML_BYTES = 1 << 14  # published ones have 3 KiB; hostile ones take long to read


def from_yaml(path: Path, tensors: Mapping[str, TensorInfo], places: Places = ldm.PLACES) -> CheckpointConfig:
    """The architecture that an original yaml describes.

    Args:
        path: The yaml.
        tensors: The checkpoint's tensors. They only matter for OpenAI's image encoder: its loader goes by their shapes,
            whatever name the yaml gives.
        places: Where the parts are.

    Returns:
        The configuration.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It is not such a yaml, or has targets, options or values that these networks do not have. The
            message names them.
    """
    return _Reader(path.name, tensors, places).model(_load(path))


def read_open_clip(description: Any, where: str) -> ClipConfig:
    """The towers that open_clip's own description of a model (`model_cfg`) means, whole.

    where: for messages.

    Raises:
        CheckpointError: An option is not supported. The message names it.
    """
    reader = _Reader(where, {})
    cfg = reader.model_cfg(description, "model_cfg")
    vision = reader.vision_tower(cfg, where)
    text = dataclasses.replace(reader.text_tower(cfg, where), projection_dim=vision.projection_dim)
    return ClipConfig(text, vision, "open_clip")


def _load(path: Path) -> Any:
    if path.stat().st_size > MAX_YAML_BYTES:
        raise CheckpointError(f"{path.name}: {path.stat().st_size} bytes is no model configuration (at most 16 KiB)")
    try:
        text = path.read_text("utf-8")
        depth = 0
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            # An alias can make a small file describe an enormous tree; a model configuration has no use for one.
            if isinstance(token, yaml.AliasToken):
                raise CheckpointError(f"{path.name}: yaml aliases are not accepted in a model configuration")
            depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
            if depth > MAX_YAML_DEPTH:
                raise CheckpointError(f"{path.name}: not a yaml of plain data: nested more than {MAX_YAML_DEPTH} deep")
        return yaml.load(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path.name}: not a yaml of plain data: {reason[:200]}") from error


class _Sections:
    """The sections of a yaml and their values, checked; keeps the file's name for messages."""

    def __init__(self, name: str, tensors: Mapping[str, TensorInfo], places: Places = ldm.PLACES):
        self.name = name
        self.tensors = tensors
        self.places = places

    def fail(self, message: str) -> NoReturn:
        raise CheckpointError(f"{self.name}: {message}")

    def section(self, node: Any, where: str) -> dict[str, Any]:
        if not isinstance(node, Mapping):
            self.fail(f"{where} is missing or not a mapping")
        return dict(node)

    def part(self, node: Any, where: str, targets: tuple[str, ...]) -> dict[str, Any]:
        """The `params` of a {target, params} node whose target is one of `targets`."""
        section = self.section(node, where)
        if section.get("target") not in targets:
            self.fail(f"{where}.target is {section.get('target')!r}; accepted: {', '.join(targets)}")
        return self.section(section.get("params") or {}, f"{where}.params")

    def take(self, params: dict[str, Any], where: str, key: str, kind: Any, default: Any = ...) -> Any:
        """Removes `key` and checks its type."""
        value = params.pop(key, default)
        if value is ...:
            self.fail(f"{where}.{key} is missing")
        if value is None and default is None:
            return None
        if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 20:
            return float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self.fail(f"{where}.{key} is {value!r}; want {getattr(kind, '__name__', kind)}")
        if kind is int and not 0 < value < 1 << 20:
            self.fail(f"{where}.{key} is {value}; want a size between 1 and {1 << 20}")
        return value

    def integers(self, params: dict[str, Any], where: str, key: str, default: Any = ...) -> tuple[int, ...]:
        values = self.take(params, where, key, list, default)
        if not all(isinstance(v, int) and not isinstance(v, bool) and 0 < v < 1 << 16 for v in values):
            self.fail(f"{where}.{key} is {values!r}; want a list of positive integers")
        return tuple(values)

    def expect(self, params: dict[str, Any], where: str, **values: tuple[Any, ...]) -> None:
        """Removes keys that must have one of the given values (the first is the default)."""
        for key, accepted in values.items():
            value = params.pop(key, accepted[0])
            if value not in accepted:
                self.fail(f"{where}.{key} is {value!r}; accepted: {', '.join(map(repr, accepted))}")

    def done(self, params: dict[str, Any], where: str, ignored: tuple[str, ...]) -> None:
        unknown = params.keys() - set(ignored)
        if unknown:
            self.fail(f"{where} has options these networks do not know: {', '.join(sorted(map(str, unknown)))}")

    def build(self, cls: Any, where: str, **values: Any) -> Any:
        try:
            return cls(**values)
        except ValueError as error:
            self.fail(f"{where}: {error}")


class _Reader(_Sections):
    """The networks that the sections describe."""

    def model(self, root: Any) -> CheckpointConfig:
        model = self.section(self.section(root, "the file").get("model"), "model")
        kind = MODELS.get(str(model.get("target")))
        if kind is None:
            self.fail(f"model.target is {model.get('target')!r}; accepted: {', '.join(MODELS)}")
        where, params = "model.params", self.section(model.get("params"), "model.params")
        if params.get("timesteps", 1000) != 1000:
            self.fail(f"{where}.timesteps is {params['timesteps']!r}; want 1000")
        parameterization = params.get("parameterization", "eps")
        predictions = {"eps": "epsilon", "v": "v_prediction"}
        if not isinstance(parameterization, str) or parameterization not in predictions:
            self.fail(f"{where}.parameterization is {parameterization!r}; accepted: 'eps', 'v'")
        unet = self.unet(params.get("unet_config"), self.take(params, where, "image_size", int, 64))
        vae = self.vae(params.get("first_stage_config"), self.take(params, where, "scale_factor", float, 1.0))
        text = self.text(params.get("cond_stage_config"))
        vision, noising, depth = None, None, None
        if kind == "depth-to-image":
            depth = self.depth(params.get("depth_stage_config"))
        if kind == "upscale":
            noising = self.low_scale(params.get("low_scale_config"))
        if kind == "variations":
            noising = COSINE
            vision = self.vision(params.get("embedder_config"))
            self.noise_augmentation(params.get("noise_aug_config"), vision)
            want = 2 * vision.projection_dim
            if unet.class_embedding != "projection" or unet.class_embedding_size != want:
                self.fail(
                    f"unet_config: adm_in_channels is {unet.class_embedding_size}; the image embedder gives {want}"
                )
        start = self.take(params, where, "linear_start", float, 1e-4)
        end = self.take(params, where, "linear_end", float, 2e-2)
        # What the original calls "linear" is linear in the square root of beta. Built here for its checks alone.
        self.build(NoiseSchedule, where, beta_start=start, beta_end=end, beta_schedule="scaled_linear")
        if text.width != unet.cross_attention_dim:
            self.fail(f"unet_config: context_dim is {unet.cross_attention_dim}; the text tower's width is {text.width}")
        config = CheckpointConfig(
            unet=unet,
            vae=vae,
            text_encoder=text,
            image_encoder=vision,
            reference=Reference.ORIGINAL,
            scheduler="ldm-ddim",
            scheduler_config={
                **PUBLISHED_UNCLIP_SCHEDULER,
                # As Stability's diffusers folders name it: PNDM but for the v_prediction ones without image encoder.
                "_class_name": "DDIMScheduler" if parameterization == "v" and not vision else "PNDMScheduler",
                "beta_start": start,
                "beta_end": end,
                "prediction_type": predictions[parameterization],
            },
            image_noising=noising,
            depth_estimator=depth,
        )
        if unet.in_channels in TASKS and config.task != kind:
            self.fail(
                f"model.target is {model.get('target')!r}, but a UNet with {unet.in_channels} input channels is for "
                f"{config.task}"
            )
        return config

    def depth(self, node: Any) -> DepthConfig | None:
        """The depth estimator: the original names MiDaS' hybrid one, without any sizes.

        None if there is nothing in its place, for files without it: depth maps are then given.
        """
        where = "model.params.depth_stage_config"
        params = self.part(node, where, DEPTH + NOTHING)
        if self.section(node, where)["target"] in NOTHING:
            return None
        self.expect(params, where, model_type=("dpt_hybrid",))
        self.done(params, where, ())
        return DepthConfig()

    def low_scale(self, node: Any) -> NoiseSchedule:
        """The noise schedule of an upscaler's small image."""
        where = "model.params.low_scale_config"
        params = self.part(node, where, LOW_SCALE)
        schedule = self.section(params.pop("noise_schedule_config", None), f"{where}.noise_schedule_config")
        start = self.take(schedule, where, "linear_start", float, 1e-4)
        end = self.take(schedule, where, "linear_end", float, 2e-2)
        self.expect(schedule, where, timesteps=(1000,), beta_schedule=("linear",))
        self.done(schedule, where, ())
        self.done(params, where, ("max_noise_level", "to_cuda"))
        return self.build(NoiseSchedule, where, beta_start=start, beta_end=end, beta_schedule="scaled_linear")

    def unet(self, node: Any, sample_size: int) -> UNetConfig:
        where = "model.params.unet_config"
        params = self.part(node, where, UNET)
        multipliers = self.integers(params, where, "channel_mult", [1, 2, 4, 8])
        width = self.take(params, where, "model_channels", int)
        channels = tuple(width * m for m in multipliers)
        levels = len(channels)
        blocks = params.pop("num_res_blocks", None)
        if isinstance(blocks, list) and len(set(map(str, blocks))) == 1 and len(blocks) == levels:
            blocks = blocks[0]
        blocks = self.take({"num_res_blocks": blocks}, where, "num_res_blocks", int)
        attention = self.integers(params, where, "attention_resolutions")
        heads, head_width = params.pop("num_heads", -1), params.pop("num_head_channels", -1)
        if (heads == -1) == (head_width == -1) or not all(isinstance(v, int) for v in (heads, head_width)):
            self.fail(f"{where}: want one of num_heads and num_head_channels, got {heads!r} and {head_width!r}")
        if head_width != -1 and (head_width < 1 or any(c % head_width for c in channels)):
            self.fail(f"{where}.num_head_channels is {head_width}; channels {channels} are not divisible by it")
        disabled = params.pop("disable_self_attentions", None) or [False] * levels
        if not isinstance(disabled, list) or len(disabled) != levels or not all(isinstance(d, bool) for d in disabled):
            self.fail(f"{where}.disable_self_attentions is {disabled!r}; want one boolean a level, {levels}")
        classes = params.pop("num_classes", None)
        embedding, size = None, None
        if classes == "sequential":
            embedding, size = "projection", self.take(params, where, "adm_in_channels", int)
        elif isinstance(classes, int) and not isinstance(classes, bool) and classes > 0:
            embedding, size = "table", classes
        elif classes is not None:
            self.fail(f"{where}.num_classes is {classes!r}; accepted: 'sequential', a positive integer, or none")
        self.expect(
            params,
            where,
            dims=(2,),
            dropout=(0, 0.0),
            conv_resample=(True,),
            use_spatial_transformer=(True,),
            use_linear_in_transformer=(True, False),
            transformer_depth=(1,),
            legacy=(False,),
            use_scale_shift_norm=(False,),
            resblock_updown=(False,),
            use_new_attention_order=(False,),
            n_embed=(None,),
            num_attention_blocks=(None,),
            disable_middle_self_attn=(False,),
        )
        config = self.build(
            UNetConfig,
            where,
            in_channels=self.take(params, where, "in_channels", int),
            out_channels=self.take(params, where, "out_channels", int),
            block_out_channels=channels,
            layers_per_block=blocks,
            attention_levels=tuple(2**level in attention for level in range(levels)),
            num_heads=tuple(heads if head_width == -1 else c // head_width for c in channels),
            cross_attention_dim=self.take(params, where, "context_dim", int),
            only_cross_attention=tuple(disabled),
            class_embedding=embedding,
            class_embedding_size=size,
            sample_size=sample_size,
        )
        self.done(params, where, ("image_size", "use_checkpoint", "use_fp16", "use_bf16", "num_heads_upsample"))
        return config

    def vae(self, node: Any, scaling_factor: float) -> VAEConfig:
        outer = "model.params.first_stage_config"
        params = self.part(node, outer, AUTOENCODER)
        where = f"{outer}.params.ddconfig"
        dd = self.section(params.get("ddconfig"), where)
        latent = self.take(dd, where, "z_channels", int)
        if params.get("embed_dim") != latent:
            self.fail(f"{outer}.params.embed_dim is {params.get('embed_dim')!r}; want z_channels, {latent}")
        width = self.take(dd, where, "ch", int)
        channels = tuple(width * m for m in self.integers(dd, where, "ch_mult"))
        config = self.build(
            VAEConfig,
            where,
            in_channels=self.take(dd, where, "in_channels", int),
            latent_channels=latent,
            block_out_channels=channels,
            layers_per_block=self.take(dd, where, "num_res_blocks", int),
            scaling_factor=scaling_factor,
        )
        self.expect(
            dd,
            where,
            out_ch=(config.in_channels,),
            double_z=(True,),
            attn_resolutions=([],),
            dropout=(0, 0.0),
            attn_type=("vanilla", "vanilla-xformers"),
        )
        self.done(dd, where, ("resolution",))
        return config

    def text(self, node: Any) -> TextConfig:
        where = "model.params.cond_stage_config"
        params = self.part(node, where, TEXT)
        description = self.description(params, where)
        layer = params.pop("layer", "last")
        if layer not in ("last", "penultimate"):
            self.fail(f"{where}.layer is {layer!r}; accepted: 'last', 'penultimate'")
        self.done(params, where, ("version", "device", "freeze", "max_length"))
        return self.text_tower(description, where, unused_layers=int(layer == "penultimate"))

    def text_tower(self, description: Mapping[str, Any], where: str, unused_layers: int = 0) -> TextConfig:
        where = f"{where}.model_cfg.text_cfg"
        cfg = self.section(description.get("text_cfg"), where)
        width = self.take(cfg, where, "width", int)
        config = self.build(
            TextConfig,
            where,
            vocab_size=self.take(cfg, where, "vocab_size", int, 49408),
            context_length=self.take(cfg, where, "context_length", int, 77),
            width=width,
            layers=self.take(cfg, where, "layers", int) - unused_layers,
            heads=self.take(cfg, where, "heads", int),
            mlp_width=int(width * self.take(cfg, where, "mlp_ratio", float, 4.0)),
            activation=self.activation(description, where),
        )
        self.done(cfg, where, ())
        return config

    def vision(self, node: Any) -> VisionConfig:
        where = "model.params.embedder_config"
        params = self.part(node, where, OPENCLIP_IMAGE + OPENAI_IMAGE)
        if self.section(node, where)["target"] in OPENAI_IMAGE:
            return self.openai_vision(where)
        description = self.description(params, where)
        self.done(params, where, ("version", "device", "freeze", "antialias", "layer", "ucg_rate", "max_length"))
        return self.vision_tower(description, where)

    def vision_tower(self, description: Mapping[str, Any], where: str) -> VisionConfig:
        projection_dim = self.take(dict(description), f"{where}.model_cfg", "embed_dim", int)
        where = f"{where}.model_cfg.vision_cfg"
        cfg = self.section(description.get("vision_cfg"), where)
        width = self.take(cfg, where, "width", int)
        head_width = self.take(cfg, where, "head_width", int, 64)
        if width % head_width:
            self.fail(f"{where}: vision width {width} is not divisible by head_width {head_width}")
        config = self.build(
            VisionConfig,
            where,
            image_size=self.take(cfg, where, "image_size", int),
            patch_size=self.take(cfg, where, "patch_size", int),
            width=width,
            layers=self.take(cfg, where, "layers", int),
            heads=width // head_width,
            mlp_width=int(width * self.take(cfg, where, "mlp_ratio", float, 4.0)),
            activation=self.activation(description, where),
            projection_dim=projection_dim,
        )
        self.done(cfg, where, ())
        return config

    def openai_vision(self, where: str) -> VisionConfig:
        """OpenAI's tower by the shapes of its tensors; its heads are always 64 wide."""
        prefix, dialect = self.places["image_encoder"]
        axes = {"patch_embedding.kernel": 2, "position_embedding.embedding": 2}
        axes |= {"layers.fc1.kernel": 3, "projection.kernel": 2}
        names = foreign_names("image_encoder", self.places, axes)
        try:
            patches, positions, fc1, projection = (self.tensors[names[name]].shape for name in axes)
            width, _, _, patch = patches
            tokens, mlp_width = positions[0], fc1[0]
            projection_dim = projection[dialect == "open_clip"]  # transformers' is a linear layer, (out, in)
        except (KeyError, ValueError, IndexError) as error:
            self.fail(f"{where}: the checkpoint holds no OpenAI image encoder under {prefix}: {error}")
        before, _, after = names["layers.fc1.kernel"].rpartition(".0.")
        layers = [name for name in self.tensors if name.startswith(f"{before}.") and name.endswith(f".{after}")]
        if width % 64 or tokens < 2 or math.isqrt(tokens - 1) ** 2 != tokens - 1:
            self.fail(
                f"{where}: {prefix} has width {width} and {tokens} positions; want a multiple of 64, a square + 1"
            )
        return self.build(
            VisionConfig,
            where,
            image_size=patch * math.isqrt(tokens - 1),
            patch_size=patch,
            width=width,
            layers=len(layers),
            heads=width // 64,
            mlp_width=mlp_width,
            activation="quick_gelu",
            projection_dim=projection_dim,
        )

    def description(self, params: dict[str, Any], where: str) -> dict[str, Any]:
        """open_clip's description of a model, `model_cfg` inline or a known `arch`."""
        arch, inline = params.pop("arch", "ViT-H-14"), params.pop("model_cfg", None)
        if inline is None and arch not in ARCHITECTURES:
            self.fail(
                f"{where}.arch is {arch!r}; known: {', '.join(ARCHITECTURES)}; "
                "describe another one with open_clip's own mapping as model_cfg beside it"
            )
        return self.model_cfg(ARCHITECTURES[arch] if inline is None else inline, f"{where}.model_cfg")

    def model_cfg(self, node: Any, where: str) -> dict[str, Any]:
        cfg = self.section(node, where)
        if unknown := cfg.keys() - {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}:
            self.fail(f"{where} has options these networks do not know: {', '.join(sorted(map(str, unknown)))}")
        return cfg

    def activation(self, description: Mapping[str, Any], where: str) -> str:
        quick = description.get("quick_gelu", False)
        if not isinstance(quick, bool):
            self.fail(f"{where}: quick_gelu is {quick!r}; want true or false")
        return "quick_gelu" if quick else "gelu"

    def noise_augmentation(self, node: Any, vision: VisionConfig) -> None:
        where = "model.params.noise_aug_config"
        params = self.part(node, where, NOISE_AUGMENTATION)
        schedule = self.section(params.pop("noise_schedule_config", None), f"{where}.noise_schedule_config")
        self.expect(schedule, where, timesteps=(1000,), beta_schedule=(COSINE.beta_schedule,))
        self.expect(params, where, timestep_dim=(vision.projection_dim,), max_noise_level=(1000,))
        self.done(params, where, ("clip_stats_path",))
