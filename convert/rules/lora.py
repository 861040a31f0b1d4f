"""What adapters (LoRA) call the modules that they change: names made from the same tables as a checkpoint's tensors.

Three forms are written: diffusers' dotted names, the original's, and kohya's, which are dotted names with the dots made
underscores. `canonical` turns what other releases and tools write into these.
"""

import dataclasses
import re
from collections import defaultdict
from typing import Literal

from convert.engine import Rule
from convert.rules import diffusers, ldm
from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.checkpoints.networks import abstract_params

Form = Literal["diffusers", "kohya", "original"]
Modules = dict[
    str, tuple[Rule, ...]
]  # a module's name -> the kernels that it holds: one, or query, key and value fused

FUSED = "attn.in_proj"
# (pattern, canonical form), one after the other: a UNet's names without their network's, as the first releases of
# diffusers and as ComfyUI write them; attention processors, whose output layer had no number; the text encoder's
# attention in the UNet's words, and without its prefix; peft's fused attention; kohya's number for a first encoder.
DIALECTS = [
    (r"((?:down_blocks|mid_block|up_blocks|time_embedding|class_embedding|conv_in|conv_out)\b.*)", r"unet.\1"),
    (r"(diffusion_model\..*)", r"model.\1"),
    (r"(unet\..*)\.processor\.(.*)", r"\1.\2"),
    (r"(unet\..*\.attn\d\.to_out)", r"\1.0"),
    (r"text_encoder\.((?:encoder|embeddings)\..*)", r"text_encoder.text_model.\1"),
    (r"(text_encoder\..*\.self_attn)\.to_(q|k|v|out)", r"\1.\2_proj"),
    (r"(cond_stage_model\..*\.resblocks\.\d+)\.attn", rf"\1.{FUSED}"),
    (r"lora_te1_(.*)", r"lora_te_\1"),
]


def canonical(name: str) -> str:
    """A module's name in one of the three forms, whatever tool wrote it."""
    for pattern, form in DIALECTS:
        if match := re.fullmatch(pattern, name):
            name = match.expand(form)
    return name


def written(config: CheckpointConfig, form: Form) -> Modules:
    """The modules of a checkpoint's UNet and text encoder that an adapter can change, as files of this form name them.

    In the original's form the text encoder's query, key and value come both fused and, split, by their own names.
    """
    names = _dotted(config, "original" if form == "original" else "diffusers")
    return {_flat(name): rules for name, rules in names.items()} if form == "kohya" else names


def read(config: CheckpointConfig) -> Modules:
    """The modules by every name that a file may have for them.

    None are of the text encoder's last layer, of which Stable Diffusion 2 reads the layer before: no rules.
    """
    theirs, original = _dotted(config, "diffusers"), _dotted(config, "original")
    # kohya's trainer of larger models names the UNet's modules after the original's, and the text encoder's never.
    flat = {_flat(name): rules for name, rules in original.items() if name.startswith(ldm.UNET)}
    flat |= {_flat(name): rules for name, rules in theirs.items()}
    return _with_last_layer(theirs | original | flat, config.text_encoder.layers)


def _dotted(config: CheckpointConfig, layout: Literal["diffusers", "original"]) -> Modules:
    module = diffusers if layout == "diffusers" else ldm
    found: dict[str, list[Rule]] = defaultdict(list)
    for rule in module.table(config, abstract_params(config)).rules:
        if rule.ours.startswith(("unet.", "text_encoder.")) and rule.ours.endswith(".kernel"):
            name = rule.foreign.replace("/", ".").removesuffix(".weight").removesuffix("_weight")
            found[name].append(rule)
            if rule.parts > 1:
                split = f"{name.removesuffix(FUSED)}attn.{rule.ours.split('.')[-2]}"
                found[split].append(dataclasses.replace(rule, part=0, parts=1))
    return {name: tuple(sorted(rules, key=lambda rule: rule.part)) for name, rules in found.items()}


def _flat(name: str) -> str:
    for prefix, short in ((f"{ldm.UNET}.", "lora_unet_"), ("unet.", "lora_unet_"), ("text_encoder.", "lora_te_")):
        if name.startswith(prefix):
            return short + name.removeprefix(prefix).replace(".", "_")
    return name


def _with_last_layer(names: Modules, last: int) -> Modules:
    first = [re.fullmatch(r"(.*[._](?:layers|resblocks)[._])0([._].*)", name) for name in names]
    unread: Modules = {f"{match[1]}{last}{match[2]}": () for match in first if match}
    return unread | names
