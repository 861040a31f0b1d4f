"""The layouts of the prior: Karlo's own checkpoint with OpenAI's text tower beside it, and diffusers' folders.

Foreign names are Karlo's own, and "text_encoder/name" for the file beside it; for a folder, "sub-folder/name".
"""

from collections.abc import Mapping
from typing import Any

from convert.engine import Table, Unused
from convert.rules import clip
from unclip_jax.checkpoints.config import PriorCheckpointConfig
from unclip_jax.models.configs import PriorConfig, TextConfig

TEXT = "text_encoder"
# Ours -> Karlo's and diffusers'.
MODULES = {
    "text_states_proj": ("text_enc_proj", "encoder_hidden_states_proj"),
    "text_embeds_proj": ("text_emb_proj", "embedding_proj"),
    "time_embedding.linear_1": ("time_embed.0", "time_embedding.linear_1"),
    "time_embedding.linear_2": ("time_embed.2", "time_embedding.linear_2"),
    "proj_in": ("clip_img_proj", "proj_in"),
    "final_norm": ("final_ln", "norm_out"),
    "proj_out": ("out_proj", "proj_to_clip_embeddings"),
}
KARLO_LAYER = {"norm1": "ln_1", "norm2": "ln_2", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj", "out_proj": "attn.c_proj"}
DIFFUSERS_LAYER = {
    "norm1": "norm1",
    "norm2": "norm3",
    **{f"{p}_proj": f"attn1.to_{p}" for p in "qkv"},
    "out_proj": "attn1.to_out.0",
    "fc1": "ff.net.0.proj",
    "fc2": "ff.net.2",
}


def karlo(prior: PriorConfig, text: TextConfig | None, params: Mapping[str, Any]) -> Table:
    """The rules for Karlo's files; text: None for the prior's alone, whose parameters `params` then holds."""
    t = Table(params)
    for ours, (theirs, _) in MODULES.items():
        t.module(f"prior.{ours}", f"model.{theirs}")
    t.tensor("prior.last_token", "model.prd_emb", "token")
    t.tensor("prior.position_embedding.embedding", "model.positional_embedding", "row")
    for layer in range(prior.layers):
        block = f"model.transformer.resblocks.{layer}"
        for ours, theirs in KARLO_LAYER.items():
            t.module(f"prior.layers.{ours}", f"{block}.{theirs}", layer=layer)
        for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
            for leaf, fused, layout in (("kernel", "weight", "linear"), ("bias", "bias", "same")):
                where = {"layer": layer, "part": part, "parts": 3, "groups": prior.heads}
                t.tensor(f"prior.layers.{name}.{leaf}", f"{block}.attn.c_qkv.{fused}", layout, **where)
    if text is not None:
        clip.open_clip_text(t, f"{TEXT}/", text)
        t.tensor("text_encoder.projection.kernel", f"{TEXT}/text_projection")
    return t


KARLO_UNUSED = [
    Unused(r"clip_mean|clip_std|causal_mask|cf_token|cf_mask", "constants; the statistics are a file apart"),
    Unused(rf"{TEXT}/visual\..*", "the image tower: the prior reads texts"),
    Unused(rf"{TEXT}/(logit_scale|attn_mask)", "CLIP's scale of similarities, and a constant"),
    Unused(rf"{TEXT}/(input_resolution|context_length|vocab_size)", "sizes, in OpenAI's files"),
]


def diffusers(config: PriorCheckpointConfig, params: Mapping[str, Any], text: str) -> Table:
    """The rules for diffusers' folder; `params` as `checkpoints.networks.abstract_params` gives them.

    text: the text encoder's sub-folder, "prior_text_encoder" or "text_encoder".
    """
    t = Table(params)
    for ours, (_, theirs) in MODULES.items():
        t.module(f"prior.{ours}", f"prior/{theirs}")
    t.tensor("prior.last_token", "prior/prd_embedding", "token")
    t.tensor("prior.position_embedding.embedding", "prior/positional_embedding", "row")
    for layer in range(config.prior.layers):
        for ours, theirs in DIFFUSERS_LAYER.items():
            t.module(f"prior.layers.{ours}", f"prior/transformer_blocks.{layer}.{theirs}", layer=layer)
    for name in ("mean", "std"):
        t.tensor(f"image_normalizer.{name}", f"prior/clip_{name}", "row")
    clip.transformers_text(t, f"{text}/", config.text_encoder)
    t.module("text_encoder.projection", f"{text}/text_projection")
    return t


def diffusers_unused(text: str) -> list[Unused]:
    """What such a folder may hold that no network reads."""
    return [
        Unused(rf"{text}/.*\.position_ids", "constants of older releases"),
        Unused(r"prior/causal_attention_mask", "a constant"),
    ]
