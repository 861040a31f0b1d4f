"""Reads LoRA files and related kinds, as written by diffusers, peft, kohya, LyCORIS, OneTrainer, ComfyUI and others."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from convert.adapters.changes import MisfitError, Tensors, changes
from convert.adapters.numbered import NUMBERED, from_list, numbered_modules
from convert.adapters.peft import Settings, folder_settings, metadata_settings
from convert.adapters.roles import modules_of
from convert.adapters.sources import PEFT_FILES, Source, find_lora_files, in_memory
from convert.adapters.textual_inversion import bundled_words
from convert.kinds import LORA, other_than
from convert.readers import CheckpointError, TensorFile, load_pickle, open_tensors, recognise
from convert.rules import lora as rules
from convert.tensor_file import naming, quoted
from unclip_jax.adapters.changes import Change
from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.checkpoints.networks import abstract_params


class Adapter(NamedTuple):
    """What a file adds to a checkpoint.

    Attributes:
        lora: Our parameters' names -> changes, see `unclip_jax.adapters.lora.Lora`.
        words: The bundled textual inversion embeddings, word -> rows (n, width).
    """

    lora: dict[str, Change]
    words: dict[str, np.ndarray]


def read_adapter(source: Source, config: CheckpointConfig, weight_name: str | None = None) -> Adapter:
    """Reads a LoRA file as an adapter of a checkpoint's UNet and text encoder.

    Arrays have the file's dtype, alpha is float32. A missing alpha is the rank. Changes of the text encoder's last
    layer, which the checkpoint does not run, are left out.

    Args:
        source: A `.safetensors` or torch file; a folder or the hub id of a repository with diffusers'
            `pytorch_lora_weights`, with peft's `adapter_model` and its settings (one, or one each in "unet" and
            "text_encoder"), or with a file called `weight_name`; or a state dict of arrays.
        config: The checkpoint's configuration.
        weight_name: The file's name in a folder or repository.

    Returns:
        The adapter.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is damaged, hostile, for another base model, or not wholly understood.
        OSError: As in `unclip_jax.checkpoints.hub.download`, with the same subclasses.
    """
    if not isinstance(source, str | os.PathLike):
        with naming("the state dict"):
            return _read(in_memory(source), config, None, None)
    lora: dict[str, Change] = {}
    words: dict[str, np.ndarray] = {}
    for path in find_lora_files(source, weight_name):
        own = folder_settings(path) if path.name in PEFT_FILES else None
        network = _network(path.parent.name) if own is not None else None
        with naming(path), _opened(path) as file:
            try:
                part = _read(file, config, network, own)
            except CheckpointError as error:
                if kind := other_than(LORA, file.tensors):
                    raise CheckpointError(kind) from error
                raise
            if twice := lora.keys() & part.lora.keys():
                raise CheckpointError(f"{min(twice)}: the folder's other file changes it too")
            lora |= part.lora
            words |= part.words
    return Adapter(lora, words)


def read_lora(source: Source, config: CheckpointConfig, weight_name: str | None = None) -> dict[str, Change]:
    """The changes of `read_adapter`, without the textual inversion embeddings that may be bundled with them."""
    return read_adapter(source, config, weight_name).lora


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[TensorFile]:
    if recognise(path) == "zip" and isinstance(content := load_pickle(path), list):
        yield from_list(content)
    else:
        with open_tensors(path) as file:
            yield file


def _network(folder: str) -> rules.Network | None:
    """The network that a peft folder's name refers to."""
    return "unet" if folder == "unet" else "text_encoder" if folder == "text_encoder" else None


def _read(file: TensorFile, config: CheckpointConfig, network: rules.Network | None, own: Settings | None) -> Adapter:
    """A file's adapter. network: the one that everything belongs to, if known; own: settings from beside the file."""
    modules, params = rules.read(config), abstract_params(config)
    words, bundled = bundled_words(file, config)
    numbered = numbered_modules(file, modules, params)
    rest = [key for key in file.tensors if key not in bundled and not NUMBERED.fullmatch(key)]
    found = modules_of(rest, modules, network) | numbered
    settings = metadata_settings(file)
    lora: dict[str, Change] = {}
    misfits: list[MisfitError] = []
    unknown: list[str] = []
    for canonical, module in found.items():
        there = modules.get(canonical)
        if there is None:
            module.kind()
            unknown += module.keys.values()
            continue
        try:
            new = changes(Tensors(file, module, there, params, settings.get(canonical.partition(".")[0], own)))
        except MisfitError as error:
            misfits.append(error)
            continue
        for ours, change in new:
            if ours in lora:
                raise CheckpointError(f"{quoted(module.name)}: the same module is there twice, under different names")
            lora[ours] = change
    if misfits:  # what names another base model best
        raise min(misfits, key=lambda error: error.rank)
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise CheckpointError(
            f"{quoted(min(unknown))}{more}: this checkpoint has no such module; an adapter of another base model?"
        )
    if not lora:
        raise CheckpointError("holds no adapter (LoRA) of a layer that this checkpoint runs")
    return Adapter(lora, words)
