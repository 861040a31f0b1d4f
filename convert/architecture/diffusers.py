"""Reads an architecture from a diffusers folder's JSON files.

Keys that a file omits take the default of the class that wrote it. An option that these networks do not have is
accepted at the value that switches it off, and otherwise refused by name.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from convert.architecture import lotus
from convert.architecture.distilled import as_distilled, is_named_turbo
from convert.kinds import kind_of_folder
from convert.readers import CheckpointError
from unclip_jax.checkpoints.config import ESTIMATES, OF_TWO_LATENTS, CheckpointConfig, ClipConfig, EstimatorConfig, Task
from unclip_jax.checkpoints.repairs import repaired_unet, repaired_vae
from unclip_jax.checkpoints.strict_json import read_object
from unclip_jax.models.configs import (
    AnyVAEConfig,
    AutoencoderTinyConfig,
    DepthConfig,
    TextConfig,
    UNetConfig,
    VAEConfig,
    VisionConfig,
)
from unclip_jax.models.depth import PATCH
from unclip_jax.reference import Reference
from unclip_jax.sampling.schedule import NoiseSchedule
from unclip_jax.sampling.solvers import scheduler_name
from unclip_jax.sampling.solvers.settings import given

# Each component's library and class in model_index.json, as far as it is always the same.
COMPONENTS = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "scheduler": ("diffusers", "PNDMScheduler"),
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
    "feature_extractor": ("transformers", "CLIPImageProcessor"),
    "image_normalizer": ("stable_diffusion", "StableUnCLIPImageNormalizer"),
    "image_noising_scheduler": ("diffusers", "DDPMScheduler"),
    "low_res_scheduler": ("diffusers", "DDPMScheduler"),
    "depth_estimator": ("transformers", "DPTForDepthEstimation"),
}
NETWORKS = ("unet", "vae", "text_encoder", "image_encoder")
TINY_VAE = "AutoencoderTiny"
_BASE = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_UNCLIP = ("image_normalizer", "image_noising_scheduler")
_ENCODER = ("image_encoder", "feature_extractor")
# What a checkpoint is for -> its pipeline class and the components that it needs.
PIPELINES: dict[Task, tuple[str, tuple[str, ...]]] = {
    "variations": ("StableUnCLIPImg2ImgPipeline", (*_BASE, *_ENCODER, *_UNCLIP)),
    "text-to-image": ("StableDiffusionPipeline", _BASE),
    "depth-to-image": ("StableDiffusionDepth2ImgPipeline", (*_BASE, "depth_estimator", "feature_extractor")),
    "upscale": ("StableDiffusionUpscalePipeline", (*_BASE, "low_res_scheduler")),
    "inpaint": ("StableDiffusionInpaintPipeline", _BASE),
    "depth": ("MarigoldDepthPipeline", _BASE),
    "normals": ("MarigoldNormalsPipeline", _BASE),
    "instruct": ("StableDiffusionInstructPix2PixPipeline", _BASE),
}
# An unCLIP checkpoint without an image encoder, which gets its embeddings from a prior.
PRIOR_PIPELINE = ("StableUnCLIPPipeline", (*_BASE, *_UNCLIP))
_TASK_OF_CLASS = {PIPELINES[task][0]: task for task in OF_TWO_LATENTS}
CLASSES = dict([*PIPELINES.values(), PRIOR_PIPELINE]) | {"StableDiffusionImg2ImgPipeline": _BASE}
# A ControlNet among the parts of such a folder is a checkpoint of its own, and the rest is another pipeline's.
CONTROLLED = {
    f"StableDiffusionControlNet{kind}Pipeline": f"StableDiffusion{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint")
}

# Of an estimator: our name -> its key in model_index.json, and the type.
ESTIMATOR: dict[str, tuple[str, type]] = {
    "prediction_type": ("prediction_type", str),
    "num_inference_steps": ("default_denoising_steps", int),
    "processing_resolution": ("default_processing_resolution", int),
    "scale_invariant": ("scale_invariant", bool),
    "shift_invariant": ("shift_invariant", bool),
    "use_full_z_range": ("use_full_z_range", bool),
}
# Options of UNet2DConditionModel that change the arithmetic and that Stable Diffusion 2 leaves off.
UNET_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dropout": (0.0, 0),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1, 1.0),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "norm_eps": (1e-5,),
    "resnet_out_scale_factor": (1.0, 1),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
# The safety checker's class, today and in the first files.
SAFETY_CHECKERS = ("StableDiffusionSafetyChecker", "SafetyChecker")
CLIP_NORMALISATION = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def torch_class(name: Any) -> Any:
    """The PyTorch name of a class of diffusers or transformers: Flax's have the same after "Flax"."""
    return name.removeprefix("Flax") if isinstance(name, str) else name


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: It is anything else.
    """
    try:
        return read_object(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def from_folder(folder: Path) -> CheckpointConfig:
    """The architecture that a diffusers folder describes.

    Raises:
        CheckpointError: It is not supported or not described. The message names file and key.
    """
    if not (folder / "model_index.json").is_file():
        kind = kind_of_folder(folder) or (
            "neither a converted checkpoint (config.json) nor a diffusers folder: model_index.json is missing"
        )
        raise CheckpointError(f"{folder.name}: {kind}")
    index = read_json(folder / "model_index.json")
    pipeline = torch_class(index.get("_class_name"))
    pipeline = CONTROLLED.get(pipeline, pipeline) if isinstance(pipeline, str) else pipeline
    is_lotus = isinstance(pipeline, str) and lotus.CLASSES.fullmatch(pipeline) is not None
    # No class of diffusers' own: it needs the parts of one, whose folders have no mistakes to correct.
    pipeline = "MarigoldDepthPipeline" if is_lotus else pipeline
    if not isinstance(pipeline, str) or pipeline not in CLASSES:
        if kind := kind_of_folder(folder):
            raise CheckpointError(f"{folder.name}: {kind}")
        raise CheckpointError(f"model_index.json: _class_name is {pipeline!r}; accepted: {', '.join(CLASSES)}")
    for component in CLASSES[pipeline]:
        entry = index.get(component)
        if not isinstance(entry, list) or len(entry) != 2 or None in entry:
            raise CheckpointError(f"model_index.json: {component} is {entry!r:.80}; {index['_class_name']} needs it")
        # diffusers would import what is named here; here another network than ours is only worth a refusal.
        accepted = (COMPONENTS[component][1], *([TINY_VAE] if component == "vae" else []))
        if component in NETWORKS and torch_class(entry[1]) not in accepted:
            raise CheckpointError(
                f"model_index.json: {component} is a {entry[1]!r:.80}; accepted: {', '.join(accepted)}"
            )
    for component, entry in index.items():
        names = entry if isinstance(entry, list) else ()
        if not all(not isinstance(name, str) or re.fullmatch(r"\w+(\.\w+)*", name) for name in names):
            raise CheckpointError(
                f"model_index.json: {component!r:.80} is {entry!r:.80}: no names of a library and class"
            )
    trained_for = None if is_lotus else _TASK_OF_CLASS.get(pipeline)
    unet_file = _Config(folder / "unet" / "config.json")
    unet = repaired_unet(_unet(unet_file), unet_file.data, pipeline, str(folder))
    vae = repaired_vae(_vae(_Config(folder / "vae" / "config.json")), pipeline, str(folder))
    text = _text(_Config(folder / "text_encoder" / "config.json"))
    vision, noising, depth = None, None, None
    if "low_res_scheduler" in CLASSES[pipeline]:
        noising = _noising(_Config(folder / "low_res_scheduler" / "scheduler_config.json"))
    if "depth_estimator" in CLASSES[pipeline]:
        depth = _depth(_Config(folder / "depth_estimator" / "config.json"))
        _depth_preprocessing(_Config(folder / "feature_extractor" / "preprocessor_config.json"), depth.image_size)
    if "image_encoder" in CLASSES[pipeline]:
        vision = _vision(_Config(folder / "image_encoder" / "config.json"))
        _preprocessing(_Config(folder / "feature_extractor" / "preprocessor_config.json"), vision.image_size)
        if unet.class_embedding != "projection" or unet.class_embedding_size != 2 * vision.projection_dim:
            raise CheckpointError(
                f"unet/config.json: projection_class_embeddings_input_dim is {unet.class_embedding_size}; "
                f"image_encoder/config.json asks for {2 * vision.projection_dim}"
            )
    if "image_noising_scheduler" in CLASSES[pipeline]:
        noising = _noising(_Config(folder / "image_noising_scheduler" / "scheduler_config.json"))
        if unet.class_embedding != "projection":
            raise CheckpointError(f"unet/config.json: class_embed_type is not 'projection', which {pipeline} needs")
    if text.width != unet.cross_attention_dim:
        raise CheckpointError(
            f"unet/config.json: cross_attention_dim is {unet.cross_attention_dim}; "
            f"text_encoder/config.json has hidden_size {text.width}"
        )
    # As in diffusers the index names the class that reads the settings, whatever class they name themselves.
    scheduler_class = str(torch_class(index["scheduler"][1]))
    scheduler = given(read_json(folder / "scheduler" / "scheduler_config.json")) | {"_class_name": scheduler_class}
    try:
        name = scheduler_name(scheduler)
    except ValueError as error:
        raise CheckpointError(f"model_index.json: scheduler: {error}") from error
    config = CheckpointConfig(
        unet=unet,
        vae=vae,
        text_encoder=text,
        image_encoder=vision,
        reference=Reference.DIFFUSERS,
        scheduler=name,
        scheduler_config=scheduler,
        preprocess="diffusers",
        image_noising=noising,
        depth_estimator=depth,
        trained_for=trained_for,
        estimator=_estimator(index) if trained_for in ESTIMATES else None,
    )
    if is_lotus:
        return lotus.as_lotus(config, folder, index.get("_name_or_path"))
    if config.trained_for is not None and not config.reads_two_latents:
        raise CheckpointError(
            f"unet/config.json: in_channels is {unet.in_channels}; {pipeline} needs {2 * vae.latent_channels}"
        )
    return as_distilled(config) if is_named_turbo(folder, index.get("_name_or_path")) else config


def _estimator(index: dict[str, Any]) -> EstimatorConfig:
    """What a pipeline's model_index.json says of an estimator, in the names of `ESTIMATOR`."""
    c = _Config(Path("model_index.json"), "model_index.json", index)
    given: dict[str, Any] = {}
    for ours, (theirs, kind) in ESTIMATOR.items():
        value = index.get(theirs)
        if value is None:
            continue
        if kind is int:
            value = c.size(theirs, value)
        elif not isinstance(value, kind):
            c.fail(f"{theirs} is {value!r:.80}; want a {kind.__name__}")
        given[ours] = value
    return EstimatorConfig(**given)


def read_unet(folder: Path) -> UNetConfig:
    """The architecture in a UNet's own folder. Raises as `from_folder` does."""
    return _unet(_Config(folder / "config.json"))


def read_vae(folder: Path) -> AnyVAEConfig:
    """The architecture in a VAE's own folder. Raises as `from_folder` does."""
    return _vae(_Config(folder / "config.json"))


def read_clip(path: Path) -> ClipConfig:
    """The towers in the config.json of transformers' CLIPModel. Raises as `from_folder` does."""
    c = _Config(path)
    parts = {}
    for key in ("text_config", "vision_config"):
        part = c.data.get(key) or {}
        if not isinstance(part, dict):
            c.fail(f"{key} is {part!r:.80}; want an object")
        parts[key] = _Config(path, f"{c.where}: {key}", part)
    width = c.integer("projection_dim", 512)
    text = dataclasses.replace(_text(parts["text_config"]), projection_dim=width)
    vision = dataclasses.replace(_vision(parts["vision_config"]), projection_dim=width)
    return ClipConfig(text, vision, "transformers")


def read_safety_checker(folder: Path) -> VisionConfig:
    """The image tower of a `safety_checker` folder, that of StableDiffusionSafetyChecker.

    Its preprocessing is checked if there is a file for it, in the folder or in `feature_extractor` beside it. Raises as
    `from_folder` does.
    """
    c = _Config(folder / "config.json")
    c.expect({"model_type": ("clip",)})
    if (kind := c.data.get("architectures")) not in (None, *([name] for name in SAFETY_CHECKERS)):
        c.fail(f"architectures is {kind!r:.80}; accepted: {[SAFETY_CHECKERS[0]]!r}")
    tower: dict[str, Any] = {}
    for key in ("vision_config", "vision_config_dict"):  # the second, of older files, has the last word
        part = c.data.get(key) or {}
        if not isinstance(part, dict):
            c.fail(f"{key} is {part!r:.80}; want an object")
        tower |= part
    vision = _vision(_Config(folder, f"{c.where}: vision_config", tower))
    for beside in (folder, folder.parent / "feature_extractor"):
        if (beside / "preprocessor_config.json").is_file():
            _preprocessing(_Config(beside / "preprocessor_config.json"), vision.image_size)
            break
    return dataclasses.replace(vision, projection_dim=c.integer("projection_dim", 512))


class _Config:
    """One configuration file, read key by key with messages that name the file and the key."""

    def __init__(self, path: Path, where: str | None = None, data: dict[str, Any] | None = None):
        self.data = read_json(path) if data is None else data
        self.where = where or f"{path.parent.name}/{path.name}"

    def fail(self, message: str) -> NoReturn:
        raise CheckpointError(f"{self.where}: {message}")

    def build(self, cls: Any, **values: Any) -> Any:
        """cls(**values), whose errors then name the file."""
        try:
            return cls(**values)
        except ValueError as error:
            self.fail(str(error))

    def integer(self, key: str, default: int) -> int:
        return self.size(key, self.data.get(key, default))

    def size(self, key: str, value: Any) -> int:
        """Checks `value`, from somewhere under `key`, as a positive integer."""
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 20:
            self.fail(f"{key} is {value!r}; want an integer between 1 and {1 << 20}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.data.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1 << 20:  # nor NaN
            self.fail(f"{key} is {value!r:.40}; want a number")
        return float(value)

    def sequence(self, key: str, default: Any, kind: type) -> tuple[Any, ...]:
        value = self.data.get(key, default)
        if not isinstance(value, list | tuple) or not value or not all(type(v) is kind for v in value):
            self.fail(f"{key} is {value!r}; want a list of {kind.__name__}")
        return tuple(value)

    def choice(self, key: str, default: Any, accepted: Mapping[Any, Any]) -> Any:
        value = self.data.get(key, default)
        if not isinstance(value, str | None) or value not in accepted:
            self.fail(f"{key} is {value!r}; accepted: {', '.join(map(repr, accepted))}")
        return accepted[value]

    def expect(self, fixed: Mapping[str, tuple[Any, ...]]) -> None:
        for key, accepted in fixed.items():
            value = self.data.get(key, accepted[0])
            if value not in accepted:
                self.fail(f"{key} is {value!r}, which these networks do not have; accepted: {accepted[0]!r}")

    def per_level(self, key: str, default: Any, levels: int) -> tuple[Any, ...]:
        """A value for each level; one that is not a list counts for all."""
        value = self.data.get(key, default)
        values = tuple(value) if isinstance(value, list | tuple) else (value,) * levels
        if len(values) != levels:
            self.fail(f"{key} is {value!r}; want one value a level, {levels}")
        return values

    def sizes(self, key: str, default: int, levels: int) -> tuple[int, ...]:
        return tuple(self.size(key, value) for value in self.per_level(key, default, levels))

    def same_size(self, key: str, default: int, levels: int) -> int:
        """A positive integer, alone or repeated for each level."""
        sizes = self.sizes(key, default, levels)
        if len(set(sizes)) != 1:
            self.fail(f"{key} is {self.data[key]!r}; want the same in every level")
        return sizes[0]


def _unet(c: _Config) -> UNetConfig:
    c.expect({"_class_name": ("UNet2DConditionModel", "FlaxUNet2DConditionModel")})
    encoder = _encoder(c)
    attention = encoder["attention_levels"]
    up = c.sequence("up_block_types", ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, str)
    if tuple(UP.get(name) for name in up) != attention[::-1]:
        c.fail(
            f"up_block_types {list(up)}: accepted are {len(attention)}, which mirror down_block_types, of "
            f"{', '.join(UP)}"
        )
    sample = c.data.get("sample_size")
    if isinstance(sample, list) and len(sample) == 2 and sample[0] == sample[1]:
        sample = sample[0]
    return c.build(
        UNetConfig,
        **encoder,
        out_channels=c.integer("out_channels", 4),
        sample_size=64 if sample is None else c.size("sample_size", sample),
    )


def _encoder(c: _Config) -> dict[str, Any]:
    """What a UNet and a ControlNet have in common, as arguments of `UNetConfig`."""
    channels = c.sequence("block_out_channels", (320, 640, 1280, 1280), int)
    levels = len(channels)
    c.expect(UNET_FIXED)
    if c.same_size("transformer_layers_per_block", 1, levels) != 1:
        c.fail(
            f"transformer_layers_per_block is {c.data['transformer_layers_per_block']!r}; "
            "these networks have one transformer layer a block"
        )
    down = c.sequence("down_block_types", ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), str)
    if len(down) != levels or not DOWN.keys() >= set(down):
        c.fail(f"down_block_types {list(down)}: accepted are {levels} of {', '.join(DOWN)}")
    # attention_head_dim is a misnomer of diffusers: it is the number of heads.
    heads = "attention_head_dim" if c.data.get("num_attention_heads") is None else "num_attention_heads"
    only_cross = c.per_level("only_cross_attention", False, levels)
    if not all(isinstance(value, bool) for value in only_cross):
        c.fail(f"only_cross_attention is {c.data['only_cross_attention']!r}; want true or false")
    kind = c.data.get("class_embed_type")
    embedding: Any = None
    size = None
    if kind == "projection":
        embedding, size = "projection", c.integer("projection_class_embeddings_input_dim", 0)
    elif kind is None and c.data.get("num_class_embeds") is not None:
        embedding, size = "table", c.integer("num_class_embeds", 0)
    elif kind is not None:
        c.fail(f"class_embed_type is {kind!r}; accepted: 'projection', null")
    return {
        "in_channels": c.integer("in_channels", 4),
        "block_out_channels": channels,
        "layers_per_block": c.same_size("layers_per_block", 2, levels),
        "attention_levels": tuple(DOWN[name] for name in down),
        "num_heads": c.sizes(heads, 8, levels),
        "cross_attention_dim": c.same_size("cross_attention_dim", 1280, levels),
        "only_cross_attention": only_cross,
        "class_embedding": embedding,
        "class_embedding_size": size,
        "norm_groups": c.integer("norm_num_groups", 32),
    }


def _vae(c: _Config) -> AnyVAEConfig:
    if torch_class(c.data.get("_class_name")) == TINY_VAE:
        return _tiny_vae(c)
    channels = c.sequence("block_out_channels", (64,), int)
    c.expect(
        {
            "_class_name": ("AutoencoderKL", "FlaxAutoencoderKL"),
            "act_fn": ("silu", "swish"),
            "mid_block_add_attention": (True,),
            "shift_factor": (None,),
            "use_quant_conv": (True,),
            "use_post_quant_conv": (True,),
            "latents_mean": (None,),
            "latents_std": (None,),
        }
    )
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if c.sequence(key, (kind,), str) != (kind,) * len(channels):
            c.fail(f"{key} is {c.data.get(key)!r}; want {len(channels)} times {kind!r}")
    channels_in = c.integer("in_channels", 3)
    c.expect({"out_channels": (channels_in,)})
    return c.build(
        VAEConfig,
        in_channels=channels_in,
        latent_channels=c.integer("latent_channels", 4),
        block_out_channels=channels,
        layers_per_block=c.integer("layers_per_block", 1),
        norm_groups=c.integer("norm_num_groups", 32),
        scaling_factor=c.number("scaling_factor", 0.18215),
    )


def _tiny_vae(c: _Config) -> AutoencoderTinyConfig:
    channels_in = c.integer("in_channels", 3)
    c.expect(
        {
            "_class_name": (TINY_VAE,),
            "act_fn": ("relu",),
            "out_channels": (channels_in,),
            "shift_factor": (0.0, 0),
            "upsample_fn": ("nearest",),
            "upsampling_scaling_factor": (2,),
        }
    )
    return c.build(
        AutoencoderTinyConfig,
        in_channels=channels_in,
        latent_channels=c.integer("latent_channels", 4),
        **{
            key: tuple(c.size(key, width) for width in c.sequence(key, (64,) * 4, int))
            for key in ("encoder_block_out_channels", "decoder_block_out_channels")
        },
        num_encoder_blocks=c.sequence("num_encoder_blocks", (1, 3, 3, 3), int),
        num_decoder_blocks=c.sequence("num_decoder_blocks", (3, 3, 3, 1), int),
        scaling_factor=c.number("scaling_factor", 1.0),
        latent_magnitude=c.number("latent_magnitude", 3.0),
        latent_shift=c.number("latent_shift", 0.5),
    )


ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu"}


def _text(c: _Config) -> TextConfig:
    c.expect({"layer_norm_eps": (1e-5,), "use_attention_mask": (None, False)})
    return c.build(
        TextConfig,
        vocab_size=c.integer("vocab_size", 49408),
        context_length=c.integer("max_position_embeddings", 77),
        width=c.integer("hidden_size", 512),
        layers=c.integer("num_hidden_layers", 12),
        heads=c.integer("num_attention_heads", 8),
        mlp_width=c.integer("intermediate_size", 2048),
        activation=c.choice("hidden_act", "quick_gelu", ACTIVATIONS),
    )


def _vision(c: _Config) -> VisionConfig:
    c.expect({"layer_norm_eps": (1e-5,), "num_channels": (3,)})
    return c.build(
        VisionConfig,
        image_size=c.integer("image_size", 224),
        patch_size=c.integer("patch_size", 32),
        width=c.integer("hidden_size", 768),
        layers=c.integer("num_hidden_layers", 12),
        heads=c.integer("num_attention_heads", 12),
        mlp_width=c.integer("intermediate_size", 3072),
        activation=c.choice("hidden_act", "quick_gelu", ACTIVATIONS),
        projection_dim=c.integer("projection_dim", 512),
    )


# Options of DPTForDepthEstimation and of its BiT backbone at the values that make them MiDaS' hybrid estimator.
DEPTH_FIXED: dict[str, tuple[Any, ...]] = {
    "readout_type": ("project",),
    "patch_size": (PATCH,),
    "num_channels": (3,),
    "qkv_bias": (True,),
    "add_projection": (False,),
    "head_in_index": (-1,),
    "neck_ignore_stages": ([0, 1],),
    "reassemble_factors": ([1, 1, 1, 0.5], [4, 2, 1, 0.5]),  # the first two are not used
    "use_batch_norm_in_fusion_residual": (False, None),
    "use_bias_in_fusion_residual": (None, True),
}
BACKBONE_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("bit",),
    "layer_type": ("bottleneck",),
    "global_padding": ("same", "SAME"),
    "embedding_dynamic_padding": (True,),
    "hidden_act": ("relu",),
    "num_channels": (3,),
    "out_features": (["stage1", "stage2", "stage3"],),
    "output_stride": (32, None),
    "width_factor": (1,),
}


BIT_DEFAULTS = {
    "layer_type": "preactivation",
    "global_padding": None,
    "embedding_dynamic_padding": False,
    "out_features": None,
    "depths": [3, 4, 6, 3],
}


def _depth(c: _Config) -> DepthConfig:
    if c.data.get("is_hybrid") is not True:
        c.fail(f"is_hybrid is {c.data.get('is_hybrid')!r:.80}; want true, MiDaS' hybrid estimator")
    c.expect(DEPTH_FIXED)
    described = c.data.get("backbone_config")
    if not isinstance(described, dict | None):
        c.fail(f"backbone_config is {described!r:.80}; want an object")
    # Left out as a whole it is what this network needs; a key left out of it is BitConfig's default, which is not.
    data = {} if described is None else BIT_DEFAULTS | described
    backbone = _Config(Path(), f"{c.where}: backbone_config", data)
    backbone.expect(BACKBONE_FIXED)
    widths = backbone.sequence("hidden_sizes", (256, 512, 1024, 2048), int)[:3]
    depths = backbone.sequence("depths", (3, 4, 9), int)[:3]
    neck = c.sequence("neck_hidden_sizes", (96, 192, 384, 768), int)
    if neck[:2] != widths[:2]:
        c.fail(f"neck_hidden_sizes is {list(neck)!r}; the backbone's first two hidden_sizes are {list(widths[:2])}")
    return c.build(
        DepthConfig,
        image_size=c.integer("image_size", 384),
        stem_width=backbone.integer("embedding_size", 64),
        stage_widths=widths,
        stage_depths=depths,
        norm_groups=backbone.integer("num_groups", 32),
        width=c.integer("hidden_size", 768),
        layers=c.integer("num_hidden_layers", 12),
        heads=c.integer("num_attention_heads", 12),
        mlp_width=c.integer("intermediate_size", 3072),
        activation=c.choice("hidden_act", "gelu", {"gelu": "gelu"}),
        norm_epsilon=c.number("layer_norm_eps", 1e-12),
        taps=c.sequence("backbone_out_indices", (2, 5, 8, 11), int)[2:],
        reassemble_widths=neck[2:],
        fusion_width=c.integer("fusion_hidden_size", 256),
    )


def _depth_preprocessing(c: _Config, image_size: int) -> None:
    """Accepts DPT's own preprocessing: -1..1 at the estimator's size, whatever the image's proportions."""
    size = c.data.get("size", image_size)
    sides = set(size.values()) if isinstance(size, dict) else {size}
    if sides != {image_size}:
        c.fail(f"size is {size!r}; the depth estimator takes {image_size} pixels")
    c.expect(dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), (True, None)))
    c.expect({"resample": (3, 2), "image_mean": ([0.5] * 3,), "image_std": ([0.5] * 3,)})
    c.expect({"keep_aspect_ratio": (False,), "do_pad": (False, None), "ensure_multiple_of": (1, 32)})


def _noising(c: _Config) -> NoiseSchedule:
    c.expect({"num_train_timesteps": (1000,), "trained_betas": (None,), "rescale_betas_zero_snr": (False,)})
    return c.build(
        NoiseSchedule,
        beta_schedule=c.data.get("beta_schedule", "linear"),
        beta_start=c.number("beta_start", 1e-4),
        beta_end=c.number("beta_end", 2e-2),
    )


def _preprocessing(c: _Config, image_size: int) -> None:
    """Accepts CLIP's own preprocessing at the tower's size, in the old style of the file (integers) and the new."""
    for key, size in (("size", c.data.get("size", 224)), ("crop_size", c.data.get("crop_size", 224))):
        if isinstance(size, dict):
            size = size.get("shortest_edge", size.get("height") if size.get("height") == size.get("width") else None)
        if size != image_size:
            c.fail(f"{key} is {c.data.get(key)!r}; the image encoder takes {image_size} pixels")
    switches = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
    c.expect(dict.fromkeys(switches, (True, None)) | {"resample": (3,), "rescale_factor": (1 / 255,)})
    c.expect({key: (value,) for key, value in CLIP_NORMALISATION.items()})
