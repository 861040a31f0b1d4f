"""Writes adapters in the forms of other tools: diffusers' and peft's, kohya's, and under the original's own names."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
from safetensors.numpy import save_file

from convert.adapters import LORA_FILES, METADATA, parameter
from convert.engine import LAYOUTS, Rule
from convert.rules import lora as names
from convert.rules.lora import Form
from unclip_jax.adapters.changes import LowRank
from unclip_jax.adapters.lora import Lora
from unclip_jax.checkpoints.atomic import replaced_file
from unclip_jax.checkpoints.config import CheckpointConfig

FILE = LORA_FILES[0]
# The ends of the names of `down` and `up`. diffusers knows a text encoder's by its own words for them.
ENDS = {
    "diffusers": ("lora_A.weight", "lora_B.weight"),
    "diffusers text": ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    "kohya": ("lora_down.weight", "lora_up.weight"),
    "original": ("lora_A.weight", "lora_B.weight"),
}


def lora_tensors(
    config: CheckpointConfig, lora: Lora, form: Form = "diffusers"
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """An adapter of a checkpoint's UNet and text encoder, as a file's tensors by name, and its metadata.

    Factors keep their numbers and dtypes. For diffusers' form alpha is in the metadata, as peft's settings; in the
    others it is a tensor, left out if it is the rank (kohya always has it).

    Args:
        config: The checkpoint's configuration.
        lora: The adapter.
        form: "diffusers", "kohya" or "original".

    Returns:
        The tensors and the metadata.

    Raises:
        ValueError: The form is unknown, the checkpoint does not have a parameter, or the adapter is empty.
    """
    if form not in get_args(Form):
        raise ValueError(f"form is {form!r}; accepted: {', '.join(get_args(Form))}")
    if not lora:
        raise ValueError("lora: an adapter of nothing")
    left = {}
    for name, change in lora.items():
        if not isinstance(change, LowRank):
            raise ValueError(f"adapter of {name}: a {type(change).__name__}; written are changes of low rank alone")
        left[name] = LowRank(*map(np.asarray, change))
    tensors: dict[str, np.ndarray] = {}
    alphas: dict[str, tuple[int, float]] = {}
    for module, rules in names.written(config, form).items():
        changes = [left[parameter(rule)] for rule in rules if parameter(rule) in left]
        if len(changes) < len(rules) or not _are_one(changes):
            continue  # query, key and value of different adapters: they are written by their own names
        for rule in rules:
            del left[parameter(rule)]
        down, up, alpha = _foreign(rules[0], changes)
        ends = ENDS["diffusers text" if form == "diffusers" and module.startswith("text_encoder.") else form]
        tensors |= {f"{module}.{ends[0]}": down, f"{module}.{ends[1]}": up}
        alphas[module] = len(down), float(alpha)
        if form == "kohya" or (form == "original" and alpha != len(down)):
            tensors[f"{module}.alpha"] = alpha
    if left:
        raise ValueError(f"adapter of {min(left)}: this checkpoint's UNet and text encoder have no such kernel")
    return tensors, _peft_settings(alphas) if form == "diffusers" else {}


def save_lora(config: CheckpointConfig, lora: Lora, path: Path | str, form: Form = "diffusers") -> Path:
    """Writes an adapter in a form that other tools read.

    Args:
        config: The checkpoint's configuration.
        lora: The adapter.
        path: A `.safetensors` file; or a folder, in which it is diffusers' `pytorch_lora_weights.safetensors`.
        form: As in `lora_tensors`.

    Returns:
        The file's path.

    Raises:
        ValueError: As in `lora_tensors`.
    """
    path = Path(path)
    path = path if path.suffix == ".safetensors" else path / FILE
    tensors, metadata = lora_tensors(config, lora, form)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as partial:
        whole = {name: np.ascontiguousarray(value).reshape(value.shape) for name, value in tensors.items()}
        save_file(whole, partial, {"format": "pt", **metadata})
    return path


def _are_one(changes: list[LowRank]) -> bool:
    """Whether the changes of fused kernels are parts of one, with the same `down` and alpha."""
    first = changes[0]
    return all(np.array_equal(c.down, first.down) and c.alpha == first.alpha for c in changes[1:])


def _foreign(rule: Rule, changes: list[LowRank]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A module's factors as PyTorch has them, and alpha."""
    down = LAYOUTS[rule.layout].foreign(changes[0].down)
    up = np.concatenate([change.up.T for change in changes])
    return down, up if down.ndim == 2 else up[:, :, None, None], np.asarray(changes[0].alpha, np.float32)


def _peft_settings(alphas: Mapping[str, tuple[int, float]]) -> dict[str, str]:
    """The metadata from which diffusers makes peft's configuration; empty if every alpha is the rank."""
    if all(rank == alpha for rank, alpha in alphas.values()):
        return {}
    settings: dict[str, Any] = {}
    for network in ("unet", "text_encoder"):
        # The ends of names: releases of transformers differ in whether "text_model" is among them.
        modules = {
            re.sub(rf"^{network}\.(text_model\.)?", "", name): numbers
            for name, numbers in alphas.items()
            if name.startswith(f"{network}.")
        }
        if modules:
            rank, alpha = (Counter(column).most_common(1)[0][0] for column in zip(*modules.values(), strict=True))
            own = {
                "r": rank,
                "lora_alpha": alpha,
                "rank_pattern": {name: r for name, (r, _) in modules.items() if r != rank},
                "alpha_pattern": {name: a for name, (_, a) in modules.items() if a != alpha},
                "target_modules": sorted(modules),
            }
            settings |= {f"{network}.{key}": value for key, value in own.items()}
    return {METADATA: json.dumps(settings, indent=2, sort_keys=True)}
