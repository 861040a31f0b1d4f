"""The layout of Flax's files, derived from PyTorch's: the networks of diffusers and transformers had both.

Flax spells the same names otherwise and has the axes that ours have, so there is no table of its own.
"""

import dataclasses
import re
from collections.abc import Iterable

from convert.engine import Rule

# A module of a list is one name in diffusers' Flax ("down_blocks_0", "to_out_0"); transformers' layers stay numbers.
LISTED = re.compile(r"(?<!layers)\.(\d+)(?=\.)")
# The VAE's attention has its old names in Flax; the UNet's, inside transformer blocks, has the new ones.
VAE_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
VAE_ATTENTION_NAME = re.compile(r"(attentions\.0)\.(to_q|to_k|to_v|to_out\.0)(?=\.)")
# A kernel has our axes already; only the patch convolution, which is a Linear of ours, keeps its own.
LAYOUTS = {"linear": "same", "conv": "same", "patch": "flax patch"}


def flax_rules(rules: Iterable[Rule]) -> list[Rule]:
    """The rules for Flax's files of a model, from those of diffusers' and transformers' files in PyTorch.

    A foreign name keeps its folder and has Flax's tensor after it, as `convert.msgpack_file` names it:
    "unet/down_blocks.0.resnets.0.norm1.weight" becomes "unet/down_blocks_0.resnets_0.norm1.scale".
    """
    return [_flax(rule) for rule in rules]


def is_flax(names: Iterable[str]) -> bool:
    """Whether a part's tensors have Flax's names: transformers wrote them into safetensors files as well."""
    return any(name.endswith(".kernel") for name in names)


def _flax(rule: Rule) -> Rule:
    assert rule.parts == 1, f"{rule.foreign}: Flax has nothing that is fused"
    module, dot, leaf = rule.foreign.rpartition(".")
    name = VAE_ATTENTION_NAME.sub(lambda match: f"{match[1]}.{VAE_ATTENTION[match[2]]}", module + dot)
    leaf = rule.ours.rpartition(".")[2] if leaf == "weight" else leaf
    layout = LAYOUTS.get(rule.layout, rule.layout)
    return dataclasses.replace(rule, foreign=LISTED.sub(r"_\1", name) + leaf, layout=layout)
