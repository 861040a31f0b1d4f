"""The names of CLIP's two towers: open_clip's (OpenAI's, too), with query, key and value fused, and transformers'."""

from collections.abc import Mapping
from typing import Any

from convert.engine import Dialect, Table, Unused
from unclip_jax.checkpoints.config import ClipConfig
from unclip_jax.models.configs import TextConfig, VisionConfig

OPEN_CLIP_LAYER = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "fc1": "mlp.c_fc",
    "fc2": "mlp.c_proj",
    "out_proj": "attn.out_proj",
}
TRANSFORMERS_LAYER = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    **{f"{p}_proj": f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")},
}


def open_clip_text(t: Table, prefix: str, config: TextConfig) -> None:
    """open_clip's names of the text tower; all begin with `prefix`."""
    t.module("text_encoder.token_embedding", f"{prefix}token_embedding")
    t.tensor("text_encoder.position_embedding.embedding", f"{prefix}positional_embedding")
    t.module("text_encoder.final_norm", f"{prefix}ln_final")
    _open_clip_layers(t, "text_encoder.layers", f"{prefix}transformer.resblocks", config.layers)


def open_clip_vision(t: Table, prefix: str, config: VisionConfig) -> None:
    """open_clip's names of the image tower; all begin with `prefix` and `visual`."""
    t.module("image_encoder.patch_embedding", f"{prefix}visual.conv1", kernel="patch")
    t.tensor("image_encoder.class_embedding", f"{prefix}visual.class_embedding")
    t.tensor("image_encoder.position_embedding.embedding", f"{prefix}visual.positional_embedding")
    t.module("image_encoder.pre_norm", f"{prefix}visual.ln_pre")
    t.module("image_encoder.post_norm", f"{prefix}visual.ln_post")
    t.tensor("image_encoder.projection.kernel", f"{prefix}visual.proj")
    _open_clip_layers(t, "image_encoder.layers", f"{prefix}visual.transformer.resblocks", config.layers)


def _open_clip_layers(t: Table, ours: str, theirs: str, layers: int) -> None:
    for layer in range(layers):
        block = f"{theirs}.{layer}"
        for a, b in OPEN_CLIP_LAYER.items():
            t.module(f"{ours}.{a}", f"{block}.{b}", layer=layer)
        for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
            for leaf, fused, layout in (("kernel", "in_proj_weight", "linear"), ("bias", "in_proj_bias", "same")):
                t.tensor(f"{ours}.{name}.{leaf}", f"{block}.attn.{fused}", layout, layer=layer, part=part, parts=3)


def transformers_text(t: Table, prefix: str, config: TextConfig) -> None:
    """transformers' names of the text tower; all begin with `prefix` and `text_model`."""
    model = f"{prefix}text_model"
    t.module("text_encoder.token_embedding", f"{model}.embeddings.token_embedding")
    t.module("text_encoder.position_embedding", f"{model}.embeddings.position_embedding")
    t.module("text_encoder.final_norm", f"{model}.final_layer_norm")
    _transformers_layers(t, "text_encoder.layers", f"{model}.encoder.layers", config.layers)


def transformers_vision(t: Table, prefix: str, config: VisionConfig) -> None:
    """transformers' names of the image tower; all begin with `prefix`."""
    model = f"{prefix}vision_model"
    t.module("image_encoder.patch_embedding", f"{model}.embeddings.patch_embedding", kernel="patch")
    t.tensor("image_encoder.class_embedding", f"{model}.embeddings.class_embedding")
    t.module("image_encoder.position_embedding", f"{model}.embeddings.position_embedding")
    t.module("image_encoder.pre_norm", f"{model}.pre_layrnorm")  # the misspelling is transformers' own
    t.module("image_encoder.post_norm", f"{model}.post_layernorm")
    t.module("image_encoder.projection", f"{prefix}visual_projection")
    _transformers_layers(t, "image_encoder.layers", f"{model}.encoder.layers", config.layers)


def _transformers_layers(t: Table, ours: str, theirs: str, layers: int) -> None:
    for layer in range(layers):
        for a, b in TRANSFORMERS_LAYER.items():
            t.module(f"{ours}.{a}", f"{theirs}.{layer}.{b}", layer=layer)


_POSITION_IDS = Unused(r"(.*\.)?position_ids", "constants of older releases")
_TEXT_UNUSED = (
    Unused(
        r"(model\.)?(transformer\.)?(text_projection(\.weight)?|logit_scale|attn_mask)",
        "not part of the hidden states' path",
    ),
    _POSITION_IDS,
)
# Between a tower and its root writers put the names of their own modules, `model` and `transformer`.
TEXT_DIALECTS = {
    "open_clip": Dialect(
        open_clip_text,
        r"token_embedding\.weight|positional_embedding|ln_final\..*|transformer\.resblocks\..*",
        ((r"model\.((?:token_embedding|positional_embedding|ln_final|transformer\.resblocks)\b.*)", r"\1"),),
        _TEXT_UNUSED,
    ),
    "transformers": Dialect(
        transformers_text,
        r"text_model\.(embeddings|encoder\.layers|final_layer_norm)\..*",
        (
            # transformers 5 writes the tower without `text_model`.
            (
                r"(?:model\.)?(?:transformer\.)?(?:text_model\.)?((?:embeddings|encoder\.layers|final_layer_norm)\..*)",
                r"text_model.\1",
            ),
        ),
        _TEXT_UNUSED,
    ),
}
_TEXT_HALF = Unused(
    r"(model\.)?(token_embedding|positional_embedding|transformer|ln_final|text_projection|logit_scale|attn_mask)\b.*",
    "the image embedder's text half",
)
VISION_DIALECTS = {
    "open_clip": Dialect(
        open_clip_vision,
        r"visual\.(?!vision_model\.|visual_projection\.).*",
        ((r"(?:open_clip\.)?(?:model\.)?(.*)", r"\1"),),
        (
            Unused(r"visual\.attn_mask|mean|std", "constants"),
            _TEXT_HALF,
        ),
    ),
    "transformers": Dialect(
        transformers_vision,
        r"vision_model\..*|visual_projection\..*",
        # ComfyUI puts the whole tower below the original's `visual`.
        ((r"(?:open_clip\.)?(?:model\.)?(?:visual\.)?((?:vision_model|visual_projection)\..*)", r"\1"),),
        (_POSITION_IDS, _TEXT_HALF),
    ),
}


def open_clip_model(config: ClipConfig, params: Mapping[str, Any]) -> Table:
    """The rules for a whole model of open_clip; `params` as `checkpoints.networks.abstract_params` gives them."""
    t = Table(params)
    open_clip_text(t, "", config.text_encoder)
    t.tensor("text_encoder.projection.kernel", "text_projection")
    open_clip_vision(t, "", config.image_encoder)
    t.tensor("similarity.logit_scale", "logit_scale")
    return t


def transformers_model(config: ClipConfig, params: Mapping[str, Any]) -> Table:
    """The rules for transformers' CLIPModel; `params` as for `open_clip_model`."""
    t = Table(params)
    transformers_text(t, "", config.text_encoder)
    t.module("text_encoder.projection", "text_projection")
    transformers_vision(t, "", config.image_encoder)
    t.tensor("similarity.logit_scale", "logit_scale")
    return t


OPEN_CLIP_UNUSED = [
    Unused(r"attn_mask|visual\.attn_mask", "constants"),
    Unused(r"input_resolution|context_length|vocab_size", "sizes, in OpenAI's files"),
]
TRANSFORMERS_UNUSED = [_POSITION_IDS]


def safety_checker(config: VisionConfig, params: Mapping[str, Any]) -> Table:
    """The rules for diffusers' StableDiffusionSafetyChecker, by the tensors' `safety_checker_name`."""
    t = Table(params)
    transformers_vision(t, "", config)
    for ours, theirs in (("concepts", "concept_embeds"), ("special_care", "special_care_embeds")):
        t.tensor(f"{ours}.embeds", theirs)
        t.tensor(f"{ours}.thresholds", f"{theirs}_weights")
    return t


def safety_checker_name(name: str) -> str:
    """One name for a tensor of either age: before transformers 5 the tower is one level deeper."""
    return name.removeprefix("vision_model.") if name.startswith("vision_model.vision_model.") else name
