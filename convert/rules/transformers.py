"""The layout of transformers' CLIP models: `text_model`, `vision_model` and their projections."""

from collections.abc import Mapping
from typing import Any

from convert.engine import Table, Unused
from unclip_jax.checkpoints.config import ClipConfig
from unclip_jax.models.clip import VisionConfig

LAYER = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    **{f"{p}_proj": f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")},
}


def table(config: ClipConfig, params: Mapping[str, Any]) -> Table:
    """The rules for CLIPModel; `params` as `unclip_jax.checkpoints.networks.abstract_params` gives them."""
    t = Table(params)
    text_tower(t, "text_model", config.text_encoder.layers)
    t.module("text_encoder.projection", "text_projection")
    vision_tower(t, "", config.image_encoder.layers)
    t.tensor("similarity.logit_scale", "logit_scale")
    return t


def safety_checker_table(config: VisionConfig, params: Mapping[str, Any]) -> Table:
    """The rules for diffusers' StableDiffusionSafetyChecker, by the tensors' `safety_checker_name`."""
    t = Table(params)
    vision_tower(t, "", config.layers)
    for ours, theirs in (("concepts", "concept_embeds"), ("special_care", "special_care_embeds")):
        t.tensor(f"{ours}.embeds", theirs)
        t.tensor(f"{ours}.thresholds", f"{theirs}_weights")
    return t


def safety_checker_name(name: str) -> str:
    """One name for a tensor of either age: releases before transformers 5 have the tower one level deeper."""
    return name.removeprefix("vision_model.") if name.startswith("vision_model.vision_model.") else name


UNUSED = [Unused(r".*\.position_ids", "constants of older releases")]


def text_tower(t: Table, model: str, layers: int) -> None:
    """The text tower's tensors, all under `model`."""
    t.module("text_encoder.token_embedding", f"{model}.embeddings.token_embedding")
    t.module("text_encoder.position_embedding", f"{model}.embeddings.position_embedding")
    t.module("text_encoder.final_norm", f"{model}.final_layer_norm")
    _layers(t, "text_encoder.layers", f"{model}.encoder.layers", layers)


def vision_tower(t: Table, prefix: str, layers: int) -> None:
    """The image tower's tensors, whose names begin with `prefix`."""
    model = f"{prefix}vision_model"
    t.module("image_encoder.patch_embedding", f"{model}.embeddings.patch_embedding", kernel="patch")
    t.tensor("image_encoder.class_embedding", f"{model}.embeddings.class_embedding")
    t.module("image_encoder.position_embedding", f"{model}.embeddings.position_embedding")
    t.module("image_encoder.pre_norm", f"{model}.pre_layrnorm")  # the misspelling is transformers' own
    t.module("image_encoder.post_norm", f"{model}.post_layernorm")
    t.module("image_encoder.projection", f"{prefix}visual_projection")
    _layers(t, "image_encoder.layers", f"{model}.encoder.layers", layers)


def _layers(t: Table, ours: str, theirs: str, layers: int) -> None:
    for layer in range(layers):
        for a, b in LAYER.items():
            t.module(f"{ours}.{a}", f"{theirs}.{layer}.{b}", layer=layer)
