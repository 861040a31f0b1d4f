"""The dialect of Flax's files, derived from PyTorch's: the networks of diffusers and transformers had both.

Flax spells the same names differently and has the same axes as we, so it needs no table of its own.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from convert.engine import Dialect, Rule, Table
from convert.rules import vae

# A module of a list is one name in diffusers' Flax ("down_blocks_0", "to_out_0"); transformers' layers stay numbers.
LISTED = re.compile(r"(?<!layers)\.(\d+)(?=\.)")
# The VAE's attention has its old names in Flax; the UNet's, inside transformer blocks, has the new ones.
VAE_ATTENTION = {vae.ATTENTION[name]: vae.OLD_ATTENTION[name] for name in vae.ATTENTION}
VAE_ATTENTION_LAYER = re.compile(rf"(mid_block\.attentions\.0)\.({'|'.join(map(re.escape, VAE_ATTENTION))})(?=\.)")
# A kernel has our axes already; only the patch convolution, which is a Linear of ours, keeps its own.
LAYOUTS = {"linear": "same", "conv": "same", "patch": "flax patch"}
# What Flax's names end with; the last two are PyTorch's as well.
LEAVES = r"(kernel|scale|embedding|bias|class_embedding)"


def with_flax(dialects: Mapping[str, Dialect], torch: str) -> dict[str, Dialect]:
    """A part's dialects, with Flax's before the PyTorch one that it is derived from.

    A tower's names differ only in their ends, and all of them are signs of both: the first one counts.
    """
    others = {name: dialect for name, dialect in dialects.items() if name != torch}
    return {**others, "flax": flax_dialect(dialects[torch]), torch: dialects[torch]}


def flax_dialect(torch: Dialect) -> Dialect:
    """Flax's names for the tensors of a part with these names in the PyTorch of diffusers or transformers."""

    def table(t: Table, prefix: str, config: Any) -> None:
        start = len(t.rules)
        torch.table(t, "", config)
        rules = flax_rules(t.rules[start:])
        t.rules[start:] = [dataclasses.replace(rule, foreign=f"{prefix}{rule.foreign}") for rule in rules]

    sign = torch.sign.replace("_blocks", r"_blocks_\d+")
    unused = (
        dataclasses.replace(item, pattern=item.pattern.replace("weight", "(?:weight|kernel)")) for item in torch.unused
    )
    return Dialect(table, rf"(?=.*\.{LEAVES}$)(?:{sign})", torch.spellings, tuple(unused))


def flax_rules(rules: Iterable[Rule]) -> list[Rule]:
    """The rules for a model's Flax files, from those for diffusers' and transformers' PyTorch files.

    A foreign name keeps its folder and has Flax's tensor after it, as `convert.msgpack_file` names it:
    "unet/down_blocks.0.resnets.0.norm1.weight" becomes "unet/down_blocks_0.resnets_0.norm1.scale".
    """
    return [_flax(rule) for rule in rules]


def is_flax(names: Iterable[str]) -> bool:
    """Whether a model's tensors have Flax's names: transformers wrote them into safetensors files, too."""
    return any(name.endswith(".kernel") for name in names)


def _flax(rule: Rule) -> Rule:
    assert rule.parts == 1, f"{rule.foreign}: Flax has nothing that is fused"
    module, dot, leaf = rule.foreign.rpartition(".")
    name = VAE_ATTENTION_LAYER.sub(lambda match: f"{match[1]}.{VAE_ATTENTION[match[2]]}", module + dot)
    leaf = rule.ours.rpartition(".")[2] if leaf == "weight" else leaf
    layout = LAYOUTS.get(rule.layout, rule.layout)
    return dataclasses.replace(rule, foreign=LISTED.sub(r"_\1", name) + leaf, layout=layout)
