"""The depth estimator's names: MiDaS' own, as in an original file, and transformers' DPTForDepthEstimation."""

from convert.engine import Dialect, Table, Unused
from unclip_jax.models.configs import DepthConfig

LAYER = {
    "norm1": "norm1",
    "norm2": "norm2",
    "out_proj": "attn.proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
TRANSFORMERS_LAYER = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "q_proj": "attention.attention.query",
    "k_proj": "attention.attention.key",
    "v_proj": "attention.attention.value",
    "out_proj": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}
HEAD = {"head_conv1": ("0", None), "head_conv2": ("2", None), "head_out": ("4", "pointwise")}


def midas(t: Table, prefix: str, config: DepthConfig) -> None:
    """MiDaS' names, which are timm's for the backbone; all begin with `prefix`."""
    backbone, scratch = f"{prefix}pretrained.model", f"{prefix}scratch"
    _resnet(t, config, f"{backbone}.patch_embed.backbone", stem="stem.conv stem.norm", block="blocks")
    t.module("depth_estimator.patch_projection", f"{backbone}.patch_embed.proj", kernel="pointwise")
    t.tensor("depth_estimator.class_token", f"{backbone}.cls_token", "token")
    t.tensor("depth_estimator.position_embedding.embedding", f"{backbone}.pos_embed", "row")
    t.module("depth_estimator.final_norm", f"{backbone}.norm")
    for layer in range(config.layers):
        block = f"{backbone}.blocks.{layer}"
        for ours, theirs in LAYER.items():
            t.module(f"depth_estimator.layers.{ours}", f"{block}.{theirs}", layer=layer)
        for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
            for leaf, fused, layout in (("kernel", "weight", "linear"), ("bias", "bias", "same")):
                ours = f"depth_estimator.layers.{name}.{leaf}"
                t.tensor(ours, f"{block}.attn.qkv.{fused}", layout, layer=layer, part=part, parts=3)
    for i in range(len(config.taps)):
        process = f"{prefix}pretrained.act_postprocess{i + 3}"
        t.module(f"depth_estimator.readouts.{i}", f"{process}.0.project.0")
        t.module(f"depth_estimator.reassemble.{i}", f"{process}.3", kernel="pointwise")
    t.module("depth_estimator.reassemble_down", f"{prefix}pretrained.act_postprocess4.4")
    for i in range(4):
        t.module(f"depth_estimator.neck.{i}", f"{scratch}.layer{i + 1}_rn")
        # MiDaS counts from the finest map, we in the order of use.
        _fusion(t, i, f"{scratch}.refinenet{4 - i}", "out_conv", "resConfUnit", "conv")
    for ours, (theirs, kernel) in HEAD.items():
        t.module(f"depth_estimator.{ours}", f"{scratch}.output_conv.{theirs}", kernel=kernel)


def transformers(t: Table, prefix: str, config: DepthConfig) -> None:
    """transformers' names; all begin with `prefix`."""
    embeddings = f"{prefix}dpt.embeddings"
    stem = "embedder.convolution embedder.norm"
    _resnet(t, config, f"{embeddings}.backbone.bit", stem=stem, stages="encoder.stages", block="layers")
    t.module("depth_estimator.patch_projection", f"{embeddings}.projection", kernel="pointwise")
    t.tensor("depth_estimator.class_token", f"{embeddings}.cls_token", "token")
    t.tensor("depth_estimator.position_embedding.embedding", f"{embeddings}.position_embeddings", "row")
    t.module("depth_estimator.final_norm", f"{prefix}dpt.layernorm")
    for layer in range(config.layers):
        for ours, theirs in TRANSFORMERS_LAYER.items():
            t.module(f"depth_estimator.layers.{ours}", f"{prefix}dpt.encoder.layer.{layer}.{theirs}", layer=layer)
    reassemble = f"{prefix}neck.reassemble_stage"
    for i in range(len(config.taps)):
        t.module(f"depth_estimator.readouts.{i}", f"{reassemble}.readout_projects.{i + 2}.0")
        t.module(f"depth_estimator.reassemble.{i}", f"{reassemble}.layers.{i + 2}.projection", kernel="pointwise")
    t.module("depth_estimator.reassemble_down", f"{reassemble}.layers.3.resize")
    for i in range(4):
        t.module(f"depth_estimator.neck.{i}", f"{prefix}neck.convs.{i}")
        _fusion(t, i, f"{prefix}neck.fusion_stage.layers.{i}", "projection", "residual_layer", "convolution")
    for ours, (theirs, kernel) in HEAD.items():
        t.module(f"depth_estimator.{ours}", f"{prefix}head.head.{theirs}", kernel=kernel)


def _resnet(t: Table, config: DepthConfig, prefix: str, *, stem: str, block: str, stages: str = "stages") -> None:
    for ours, theirs in zip(("conv", "norm"), stem.split(), strict=True):
        t.module(f"depth_estimator.stem.{ours}", f"{prefix}.{theirs}")
    for stage, depth in enumerate(config.stage_depths):
        for number in range(depth):
            ours = f"depth_estimator.stages.{stage}.blocks.{number}"
            theirs = f"{prefix}.{stages}.{stage}.{block}.{number}"
            for kind in ("conv", "norm"):
                t.module(f"{ours}.downsample.{kind}", f"{theirs}.downsample.{kind}")
                for i in (1, 2, 3):
                    t.module(f"{ours}.conv{i}.{kind}", f"{theirs}.{kind}{i}")


def _fusion(t: Table, index: int, theirs: str, projection: str, residual: str, conv: str) -> None:
    ours = f"depth_estimator.fusion.{index}"
    t.module(f"{ours}.projection", f"{theirs}.{projection}", kernel="pointwise")
    for unit in (1, 2):
        for i in (1, 2):
            t.module(f"{ours}.residual{unit}.conv{i}", f"{theirs}.{residual}{unit}.{conv}{i}")


DIALECTS = {
    "midas": Dialect(
        midas,
        r"(pretrained|scratch)\..*",
        ((r"model\.((?:pretrained|scratch)\..*)", r"\1"),),
        (Unused(r"pretrained\.model\.head\..*", "the depth estimator's backbone as a classifier"),),
    ),
    "transformers": Dialect(transformers, r"(dpt|neck|head)\..*"),
}
