"""The VAE's names: the original's (ldm), whose decoder counts levels from the lowest resolution up, and diffusers'.

The attention in the middle has had the most names: `q`, `k`, `v`, `proj_out`, 1x1 convolutions, in the original;
`query`, `key`, `value`, `proj_attn`, matrices, in diffusers before 0.18; and `to_q`, `to_k`, `to_v`, `to_out.0` since.
Converters mix them, so all of them are read in either dialect.
"""

from convert.engine import Dialect, Table, Unused
from unclip_jax.models.configs import VAEConfig

LDM_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
RESNET = {name: name for name in LDM_RESNET}
LDM_ATTENTION = {"norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
ATTENTION = {"norm": "group_norm", "to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}
OLD_ATTENTION = {"norm": "group_norm", "to_q": "query", "to_k": "key", "to_v": "value", "to_out": "proj_attn"}


def ldm(t: Table, prefix: str, config: VAEConfig) -> None:
    """The original's names; all begin with `prefix`."""
    levels = len(config.block_out_channels)
    names = {name: name for name in ("quant_conv", "post_quant_conv")}
    for half, blocks, down in (("encoder", "down_blocks", True), ("decoder", "up_blocks", False)):
        names |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        names[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        for i in range(levels):
            ours = f"{half}.{blocks}.{i}"
            theirs = f"{half}.down.{i}" if down else f"{half}.up.{levels - 1 - i}"
            for j in range(config.layers_per_block + (not down)):
                names |= {f"{ours}.resnets.{j}.{a}": f"{theirs}.block.{j}.{b}" for a, b in LDM_RESNET.items()}
            names[f"{ours}.resample"] = f"{theirs}.{'downsample' if down else 'upsample'}.conv"
        for j in range(2):
            names |= {
                f"{half}.mid_block.resnets.{j}.{a}": f"{half}.mid.block_{j + 1}.{b}" for a, b in LDM_RESNET.items()
            }
        for a, b in LDM_ATTENTION.items():
            t.module(f"vae.{half}.mid_block.attention.{a}", f"{prefix}{half}.mid.attn_1.{b}", kernel="pointwise")
    for ours, theirs in names.items():
        t.module(f"vae.{ours}", f"{prefix}{theirs}")


def diffusers(t: Table, prefix: str, config: VAEConfig) -> None:
    """diffusers' names; all begin with `prefix`."""
    for name in ("quant_conv", "post_quant_conv"):
        t.module(f"vae.{name}", f"{prefix}{name}")
    for half, blocks, resample, count in (
        ("encoder", "down_blocks", "downsamplers", config.layers_per_block),
        ("decoder", "up_blocks", "upsamplers", config.layers_per_block + 1),
    ):
        for name in ("conv_in", "conv_norm_out", "conv_out"):
            t.module(f"vae.{half}.{name}", f"{prefix}{half}.{name}")
        for level in range(len(config.block_out_channels)):
            block = f"{half}.{blocks}.{level}"
            for i in range(count):
                for name in RESNET:
                    t.module(f"vae.{block}.resnets.{i}.{name}", f"{prefix}{block}.resnets.{i}.{name}")
            t.module(f"vae.{block}.resample", f"{prefix}{block}.{resample}.0.conv")
        middle = f"{half}.mid_block"
        for i in range(2):
            for name in RESNET:
                t.module(f"vae.{middle}.resnets.{i}.{name}", f"{prefix}{middle}.resnets.{i}.{name}")
        for ours, theirs in ATTENTION.items():
            t.module(f"vae.{middle}.attention.{ours}", f"{prefix}{middle}.attentions.0.{theirs}")


def _attention_spellings(module: str, names: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """Every other name of the attention's layers, in the module of this name, -> this dialect's name."""
    return tuple(
        (rf"((?:en|de)coder\.{module})\.{other[ours].replace('.', '[.]')}\.(weight|bias)", rf"\1.{name}.\2")
        for other in (LDM_ATTENTION, ATTENTION, OLD_ATTENTION)
        for ours, name in names.items()
        if other[ours] != name
    )


_UNUSED = (Unused(r"loss\..*", "what the autoencoder was trained with"),)
DIALECTS = {
    "ldm": Dialect(
        ldm,
        r"(encoder|decoder)\.(down|up|mid|norm_out)\..*",
        _attention_spellings(r"mid\.attn_1", LDM_ATTENTION),
        _UNUSED,
    ),
    "diffusers": Dialect(
        diffusers,
        r"(encoder|decoder)\.(down_blocks|up_blocks|mid_block|conv_norm_out)\..*",
        _attention_spellings(r"mid_block\.attentions\.0", ATTENTION),
        _UNUSED,
    ),
}
