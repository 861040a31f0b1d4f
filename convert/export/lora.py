"""Adapters in the file that diffusers and peft read: `pytorch_lora_weights.safetensors`."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from convert.engine import LAYOUTS
from convert.rules import diffusers
from unclip_jax.checkpoints.atomic import replaced_file
from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.checkpoints.networks import abstract_params
from unclip_jax.training.lora import adapted

FILE = "pytorch_lora_weights.safetensors"


def lora_tensors(config: CheckpointConfig, adapter: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An adapter of a checkpoint's UNet under peft's names: `unet.<module>.lora_A.weight` and `lora_B.weight`.

    adapter: as `unclip_jax.training.lora` has it, of the UNet's parameters. Raises ValueError for parameters that the
    checkpoint's UNet does not have.
    """
    params = abstract_params(config)
    rules = {rule.ours: rule for rule in diffusers.table(config, params).rules}
    tensors = {}
    for name in adapted(adapter):
        rule = rules.get(f"unet.{name}")
        if rule is None:
            raise ValueError(f"adapter of {name}: this checkpoint's UNet has no such parameter")
        component, _, foreign = rule.foreign.partition("/")
        down, up = (np.asarray(adapter[f"{name}.{end}"], np.float32) for end in ("down", "up"))
        # B's layout is the kernel's own for a kernel of one pixel.
        up = up if down.ndim == 2 else up[None, None]
        module = f"{component}.{foreign.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = LAYOUTS[rule.layout].foreign(down)
        tensors[f"{module}.lora_B.weight"] = LAYOUTS[rule.layout].foreign(up)
    return tensors


def save_lora(config: CheckpointConfig, adapter: Mapping[str, np.ndarray], folder: Path) -> Path:
    """Writes the file into a folder, for a diffusers pipeline's `load_lora_weights`; returns its path."""
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as partial:
        tensors = lora_tensors(config, adapter)
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, partial, {"format": "pt"})
    return path
