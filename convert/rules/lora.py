"""The names that adapters give the modules that they change, made from the same tables as a checkpoint's tensors.

Three forms are written: diffusers' dotted names, the original's, and kohya's, which are dotted names with underscores
instead of dots. Names are read (`find`) with any prefix by which tools distinguish the networks, followed by a module's
name in diffusers' (transformers') or the original's spelling, with dots or underscores.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Literal

from convert.engine import Rule
from convert.rules import diffusers, ldm
from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.checkpoints.networks import abstract_params

Form = Literal["diffusers", "kohya", "original"]
Network = Literal["unet", "text_encoder"]
# A module's name -> the kernels that it holds: one, or query, key and value fused.
Modules = dict[str, tuple[Rule, ...]]

FUSED = "attn.in_proj"
# What wraps a module or a network, and is no part of its name: peft's, torch's compilation and data parallelism, the
# attention processors of old releases of diffusers.
WRAPPERS = re.compile(
    r"(^|\.)(base_model\.model|base_layer|modules_to_save|_orig_mod|module|processor|default)(?=\.|$)"
)
# How tools tell the networks apart: diffusers, the original, ComfyUI, kohya (whose flat names end the prefix with an
# underscore, as those of LyCORIS' own wrapper), OneTrainer (which says clip_l of Stable Diffusion 2 as well).
PREFIXES: dict[Network, str] = {
    "unet": r"unet|lora_unet|lycoris|(?:model\.)?diffusion_model",
    "text_encoder": (
        r"text_encoder|lora_te1?|lycoris|(?:lora_)?clip_[hl]|text_encoders\.clip_[hl]"
        r"|cond_stage_model|conditioner\.embedders\.0"
    ),
}
# (pattern, canonical form), one after the other, of names within a network with their dots made underscores: what
# stands before a text tower's layers; attention in the UNet's words; the output layer of old attention processors,
# which had no number; peft's fused attention.
DIALECTS: dict[Network, list[tuple[str, str]]] = {
    "unet": [(r"(.*_attn\d_to_out)", r"\1_0")],
    "text_encoder": [
        (r"(?:model_)?(?:transformer_)?(?:text_model_)?(.*)", r"\1"),
        (r"(.*_self_attn)_to_(q|k|v|out)", r"\1_\2_proj"),
        (r"(resblocks_\d+_attn)", r"\1_in_proj"),
    ],
}


@dataclasses.dataclass(frozen=True)
class Module:
    """The rules that fill a module: its kernel, scale or embedding, and its bias; several if they are fused.

    Without any rule, the module is not run.
    """

    weight: tuple[Rule, ...] = ()
    bias: tuple[Rule, ...] = ()


def written(config: CheckpointConfig, form: Form) -> Modules:
    """The kernels of a checkpoint's UNet and text encoder by their modules' names in files of this form.

    In the original's form the text encoder's query, key and value come both fused and, split, under their own names.
    """
    dotted = _dotted(config, "original" if form == "original" else "diffusers")
    kernels = {
        name: module.weight
        for name, module in dotted.items()
        if module.weight and module.weight[0].ours.endswith(".kernel")
    }
    return {_flat(name): rules for name, rules in kernels.items()} if form == "kohya" else kernels


def read(config: CheckpointConfig) -> dict[str, Module]:
    """The modules of a checkpoint's UNet and text encoder by the canonical names from `find`.

    Each is there by diffusers' and by the original's name. Those that Stable Diffusion 2 does not run have no rules:
    the text encoder's last layer, its projection.
    """
    modules = {f"text_encoder.{name}": Module() for name in ("text_projection", "logit_scale")}
    layouts: tuple[Literal["original", "diffusers"], ...] = ("original", "diffusers")
    for layout in layouts:
        for name, module in _dotted(config, layout).items():
            network: Network = "unet" if name.startswith(("unet.", ldm.UNET)) else "text_encoder"
            modules[f"{network}.{_canonical(name, network)}"] = module
    last = config.text_encoder.layers
    for name in list(modules):
        if match := re.fullmatch(r"(text_encoder\.(?:encoder_layers|resblocks)_)0(_.*)", name):
            modules.setdefault(f"{match[1]}{last}{match[2]}", Module())
    return modules


def find(name: str, modules: Mapping[str, Module], network: Network | None = None) -> str | None:
    """A module's canonical name, "unet.…" or "text_encoder.…", whatever tool wrote it, or None.

    network: the one that it belongs to, if the file's place says so.
    """
    name = WRAPPERS.sub("", name).removeprefix(".")
    for candidate in PREFIXES:
        canonical = f"{candidate}.{_canonical(name, candidate)}"
        if network in (None, candidate) and canonical in modules:
            return canonical
    return None


def _canonical(name: str, network: Network) -> str:
    """A module's name within its network, as the tables spell it, but with its dots made underscores."""
    # The first releases of diffusers, and peft's folders, name no network.
    flat = re.sub(rf"^(?:{PREFIXES[network]})[._]", "", name).replace(".", "_")
    for pattern, form in DIALECTS[network]:
        if match := re.fullmatch(pattern, flat):
            flat = match.expand(form)
    return flat


def _dotted(config: CheckpointConfig, layout: Literal["diffusers", "original"]) -> dict[str, Module]:
    table = (diffusers if layout == "diffusers" else ldm).table(config, abstract_params(config))
    found: dict[str, dict[str, list[Rule]]] = defaultdict(lambda: {"weight": [], "bias": []})
    for rule in table.rules:
        if rule.ours.startswith(("unet.", "text_encoder.")):
            name, leaf = _module(rule.foreign.replace("/", "."))
            found[name][leaf].append(rule)
            if rule.parts > 1:
                split = f"{name.removesuffix(FUSED)}attn.{rule.ours.split('.')[-2]}"
                found[split][leaf].append(dataclasses.replace(rule, part=0, parts=1))
    return {
        name: Module(*(tuple(sorted(rules, key=lambda rule: rule.part)) for rules in leaves.values()))
        for name, leaves in found.items()
    }


def _module(tensor: str) -> tuple[str, str]:
    """The name of a tensor's module, and whether the tensor is its weight or its bias."""
    match = re.fullmatch(r"(.*)[._](weight|bias)", tensor)
    return (match[1], match[2]) if match else (tensor, "weight")


def _flat(name: str) -> str:
    prefix, short = ("unet.", "lora_unet_") if name.startswith("unet.") else ("text_encoder.", "lora_te_")
    return short + name.removeprefix(prefix).replace(".", "_")
