"""Reads the safety checker that diffusers puts beside a Stable Diffusion model."""

import contextlib
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from convert.architecture.diffusers import read_safety_checker
from convert.engine import check, import_params, require_complete
from convert.readers import CheckpointError, open_tensors
from convert.rules import clip
from convert.rules.flax import flax_rules, is_flax
from convert.weights import weights_file
from unclip_jax.checkpoints.networks import abstract_network, fill, part
from unclip_jax.models.clip import VisionEncoder
from unclip_jax.safety import CONCEPTS, SPECIAL_CARE, Concepts, SafetyChecker

FOLDER = "safety_checker"


def open_safety_checker(folder: str | os.PathLike[str], *, variant: str | None = None) -> SafetyChecker:
    """Opens the safety checker of a diffusers folder, in float32.

    Args:
        folder: The `safety_checker` folder itself (`config.json` and `model.safetensors` or `pytorch_model.bin`), or
            the folder of the model that has it.
        variant: Of the weights, such as "fp16"; without such a file the plain one is read.

    Returns:
        The safety checker.

    Raises:
        FileNotFoundError: There is no such folder.
        CheckpointError: The folder is incomplete, broken or of another kind.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"safety checker: no such folder: {path}")
    if (path / "model_index.json").is_file():
        path /= FOLDER
        if not path.is_dir():
            raise CheckpointError(f"{path.parent.name}: a model without a {FOLDER} folder")
    config = read_safety_checker(path)
    network = abstract_network(VisionEncoder, config)
    params = {f"image_encoder.{name}": spec for name, spec in network.params.items()}
    for name, count in (("concepts", CONCEPTS), ("special_care", SPECIAL_CARE)):
        params[f"{name}.embeds"] = jax.ShapeDtypeStruct((count, config.projection_dim), jnp.float32)
        params[f"{name}.thresholds"] = jax.ShapeDtypeStruct((count,), jnp.float32)
    rules = clip.safety_checker(config, params).rules
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_tensors(weights_file(path, variant)))
        names = {clip.safety_checker_name(name): name for name in file.tensors}
        if len(names) < len(file.tensors):
            raise CheckpointError(f"{path.name}: tensors are there twice, under names of two ages")
        tensors = {name: file.tensors[original] for name, original in names.items()}
        if is_flax(tensors):
            rules = flax_rules(rules)
        require_complete(check(rules, params, tensors, clip.TRANSFORMERS_UNUSED), path.name)
        parameters = import_params(rules, params, tensors, lambda name: file.read(names[name]))

        def concepts(name: str) -> Concepts:
            # Copied: what is read may be a view of the file, which is closed below.
            return Concepts(**{key: np.array(p.read(), np.float32) for key, p in part(parameters, name).items()})

        filled = fill(
            network,
            lambda name: parameters[f"image_encoder.{name}"].read(),
            lambda _, array: jnp.array(array).block_until_ready(),
        )
        return SafetyChecker(filled, config.image_size, concepts("concepts"), concepts("special_care"))
