"""The UNet's names: the original's (ldm) and diffusers'.

The original numbers its blocks through the whole network (`input_blocks.0` .. `output_blocks.11`); diffusers counts
them by level.
"""

from collections.abc import Iterable, Iterator

from convert.engine import Dialect, Table
from unclip_jax.models.configs import UNetConfig

LDM_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
RESNET = {name: name for name in LDM_RESNET}
# The same in both.
TRANSFORMER = {
    **{name: name for name in ("norm", "proj_in", "proj_out")},
    **{f"norm{i}": f"transformer_blocks.0.norm{i}" for i in (1, 2, 3)},
    **{f"attn{i}.to_{p}": f"transformer_blocks.0.attn{i}.to_{p}" for i in (1, 2) for p in "qkv"},
    **{f"attn{i}.to_out": f"transformer_blocks.0.attn{i}.to_out.0" for i in (1, 2)},
    "ff.proj_in": "transformer_blocks.0.ff.net.0.proj",
    "ff.proj_out": "transformer_blocks.0.ff.net.2",
}


def ldm(t: Table, prefix: str, config: UNetConfig) -> None:
    """The original's names; all begin with `prefix`."""
    ldm_encoder(t, "unet.", prefix, config)
    for ours, theirs in {"conv_norm_out": "out.0", "conv_out": "out.2"}.items():
        t.module(f"unet.{ours}", f"{prefix}{theirs}")
    _ldm_blocks(t, "unet.", prefix, _ldm_up(config))


def ldm_encoder(t: Table, own: str, prefix: str, config: UNetConfig) -> None:
    """The original's names of the embeddings, the way down and the middle. own: what our names begin with."""
    for ours, theirs in {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "class_embedding.linear_1": "label_emb.0.0",
        "class_embedding.linear_2": "label_emb.0.2",
        "class_embedding": "label_emb",
        "conv_in": "input_blocks.0.0",
    }.items():
        t.module(f"{own}{ours}", f"{prefix}{theirs}")
    _ldm_blocks(t, own, prefix, _ldm_down(config))


def _ldm_blocks(t: Table, own: str, prefix: str, blocks: Iterable[tuple[str, str, str]]) -> None:
    inside = {"resnet": LDM_RESNET, "transformer": TRANSFORMER, "conv": {"": ""}}
    for kind, ours, theirs in blocks:
        for a, b in inside[kind].items():
            t.module(f"{own}{_join(ours, a)}", f"{prefix}{_join(theirs, b)}")


def _ldm_down(config: UNetConfig) -> Iterator[tuple[str, str, str]]:
    """(kind, our module, the original's module) of every block down to the middle, in the original's numbering."""
    number = 1
    for level, attention in enumerate(config.attention_levels):
        for i in range(config.layers_per_block):
            yield "resnet", f"down_blocks.{level}.resnets.{i}", f"input_blocks.{number}.0"
            if attention:
                yield "transformer", f"down_blocks.{level}.attentions.{i}", f"input_blocks.{number}.1"
            number += 1
        if level < len(config.attention_levels) - 1:
            yield "conv", f"down_blocks.{level}.resample", f"input_blocks.{number}.0.op"
            number += 1
    yield "resnet", "mid_block.resnets.0", "middle_block.0"
    yield "transformer", "mid_block.attentions.0", "middle_block.1"
    yield "resnet", "mid_block.resnets.1", "middle_block.2"


def _ldm_up(config: UNetConfig) -> Iterator[tuple[str, str, str]]:
    """The same of the blocks on the way up."""
    number = 0
    for up, attention in enumerate(reversed(config.attention_levels)):
        for i in range(config.layers_per_block + 1):
            yield "resnet", f"up_blocks.{up}.resnets.{i}", f"output_blocks.{number}.0"
            if attention:
                yield "transformer", f"up_blocks.{up}.attentions.{i}", f"output_blocks.{number}.1"
            number += 1
        if up < len(config.attention_levels) - 1:
            # The upsampler is the last module of the level's last block: second where there is no transformer.
            yield "conv", f"up_blocks.{up}.resample", f"output_blocks.{number - 1}.{2 if attention else 1}.conv"


def diffusers(t: Table, prefix: str, config: UNetConfig) -> None:
    """diffusers' names; all begin with `prefix`."""
    diffusers_encoder(t, "unet.", prefix, config)
    for name in ("conv_norm_out", "conv_out"):
        t.module(f"unet.{name}", f"{prefix}{name}")
    for level in range(len(config.block_out_channels)):
        _diffusers_block(t, "unet.", prefix, f"up_blocks.{level}", config.layers_per_block + 1, "upsamplers")


def diffusers_encoder(t: Table, own: str, prefix: str, config: UNetConfig) -> None:
    """diffusers' names of the embeddings, the way down and the middle. own: what our names begin with."""
    for name in (
        *(f"{kind}_embedding.linear_{i}" for kind in ("time", "class") for i in (1, 2)),
        *("class_embedding", "conv_in"),
    ):
        t.module(f"{own}{name}", f"{prefix}{name}")
    for level in range(len(config.block_out_channels)):
        _diffusers_block(t, own, prefix, f"down_blocks.{level}", config.layers_per_block, "downsamplers")
    _diffusers_block(t, own, prefix, "mid_block", 2, "")


def _diffusers_block(t: Table, own: str, prefix: str, block: str, count: int, resample: str) -> None:
    for i in range(count):
        for kind, inside in (("resnets", RESNET), ("attentions", TRANSFORMER)):
            for ours, theirs in inside.items():
                t.module(f"{own}{block}.{kind}.{i}.{ours}", f"{prefix}{block}.{kind}.{i}.{theirs}")
    t.module(f"{own}{block}.resample", f"{prefix}{block}.{resample}.0.conv")


def _join(module: str, inner: str) -> str:
    return f"{module}.{inner}" if inner else module


DIALECTS = {
    "ldm": Dialect(ldm, r"(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\..*"),
    "diffusers": Dialect(
        diffusers,
        r"(down_blocks|mid_block|up_blocks|conv_in|conv_norm_out|conv_out|time_embedding|class_embedding)\..*",
    ),
}
