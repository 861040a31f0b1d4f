"""The layout of open_clip's models, and of OpenAI's: query, key and value fused, the image tower under `visual`."""

from collections.abc import Mapping
from typing import Any

from convert.engine import Table, Unused
from unclip_jax.checkpoints.config import ClipConfig

LAYER = {"norm1": "ln_1", "norm2": "ln_2", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj", "out_proj": "attn.out_proj"}


def table(config: ClipConfig, params: Mapping[str, Any]) -> Table:
    """The rules for a model with both towers; `params` as `checkpoints.networks.abstract_params` gives them."""
    t = Table(params)
    text_tower(t, "", config.text_encoder.layers)
    t.tensor("text_encoder.projection.kernel", "text_projection")
    vision_tower(t, "visual", config.image_encoder.layers)
    t.tensor("similarity.logit_scale", "logit_scale")
    return t


UNUSED = [
    Unused(r"attn_mask|visual\.attn_mask", "constants"),
    Unused(r"input_resolution|context_length|vocab_size", "sizes, in OpenAI's files"),
]


def text_tower(t: Table, prefix: str, layers: int) -> None:
    """The text tower's tensors, whose names begin with `prefix` and a dot, with a folder ("x/"), or with nothing."""
    dotted = f"{prefix}." if prefix and not prefix.endswith("/") else prefix
    t.module("text_encoder.token_embedding", f"{dotted}token_embedding")
    t.tensor("text_encoder.position_embedding.embedding", f"{dotted}positional_embedding")
    t.module("text_encoder.final_norm", f"{dotted}ln_final")
    _layers(t, "text_encoder.layers", f"{dotted}transformer.resblocks", layers)


def vision_tower(t: Table, prefix: str, layers: int) -> None:
    """The image tower's tensors, whose names begin with `prefix` and a dot."""
    t.module("image_encoder.patch_embedding", f"{prefix}.conv1", kernel="patch")
    t.tensor("image_encoder.class_embedding", f"{prefix}.class_embedding")
    t.tensor("image_encoder.position_embedding.embedding", f"{prefix}.positional_embedding")
    t.module("image_encoder.pre_norm", f"{prefix}.ln_pre")
    t.module("image_encoder.post_norm", f"{prefix}.ln_post")
    t.tensor("image_encoder.projection.kernel", f"{prefix}.proj")
    _layers(t, "image_encoder.layers", f"{prefix}.transformer.resblocks", layers)


def _layers(t: Table, ours: str, theirs: str, layers: int) -> None:
    for layer in range(layers):
        block = f"{theirs}.{layer}"
        for a, b in LAYER.items():
            t.module(f"{ours}.{a}", f"{block}.{b}", layer=layer)
        for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
            for leaf, fused, layout in (("kernel", "in_proj_weight", "linear"), ("bias", "in_proj_bias", "same")):
                t.tensor(f"{ours}.{name}.{leaf}", f"{block}.attn.{fused}", layout, layer=layer, part=part, parts=3)
