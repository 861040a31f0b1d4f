"""The source of an adapter: a file, a folder, a repository on the hub, or a state dict in memory."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert.tensor_file import CheckpointError, TensorFile, TensorInfo, quoted
from unclip_jax.checkpoints.hub import download_file
from unclip_jax.checkpoints.places import place_of

LORA_FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
WORD_FILES = ("learned_embeds.safetensors", "learned_embeds.bin")
# peft's folders, one per network, with the settings beside the file.
PEFT_FILES, PEFT_SETTINGS = ("adapter_model.safetensors", "adapter_model.bin"), "adapter_config.json"
PEFT_FOLDERS = ("unet", "text_encoder")

Source = str | os.PathLike[str] | Mapping[str, Any]


def find_file(source: str | os.PathLike[str], usual: tuple[str, ...], weight_name: str | None) -> Path:
    """The file itself, or the one that a folder or a repository has under the given or one of the usual names."""
    if place := place_of(os.fspath(source)):
        return download_file(place.repo_id, usual, weight_name, path=place.path, revision=place.revision)
    path = Path(source)
    if not path.is_dir():
        if weight_name is not None:
            raise ValueError(f"weight_name is {weight_name!r}, but {path} is not a folder")
        return path
    wanted = usual if weight_name is None else (weight_name,)
    found = next((path / name for name in wanted if (path / name).exists()), None)
    if found is None:
        raise FileNotFoundError(f"{path}: holds none of {', '.join(wanted)}; name the file itself")
    return found


def find_lora_files(source: str | os.PathLike[str], weight_name: str | None) -> list[Path]:
    """The files of an adapter: one, or one per network if peft's folders "unet" and "text_encoder" lie side by side."""
    nested = tuple(f"{folder}/{name}" for folder in PEFT_FOLDERS for name in PEFT_FILES)
    path = find_file(source, (*LORA_FILES, *PEFT_FILES, *nested), weight_name)
    if path.name not in PEFT_FILES:
        return [path]
    place = place_of(os.fspath(source))
    named = PurePosixPath(place.path) if place else Path(source)
    # The source is the folder around the two, rather than one of them or its file.
    around_both = named.name not in (path.parent.name, path.name)
    together = weight_name is None and path.parent.name in PEFT_FOLDERS and around_both
    if place is not None:
        root = str(named.parent if named.name == path.name else named)
        within: dict[str, Any] = {"path": "" if root == "." else root, "revision": place.revision}
        for folder in [f"{folder}/" for folder in PEFT_FOLDERS] if together else [""]:
            with contextlib.suppress(ValueError):  # a repository may lack the file
                download_file(place.repo_id, (), f"{folder}{PEFT_SETTINGS}", **within)
                download_file(place.repo_id, [f"{folder}{name}" for name in PEFT_FILES], **within)
    if not together:
        return [path]
    around = path.parent.parent
    found = [[around / folder / name for name in PEFT_FILES if (around / folder / name).exists()]
             for folder in PEFT_FOLDERS]  # fmt: skip
    return [files[0] for files in found if files]


def in_memory(state: Mapping[str, Any]) -> TensorFile:
    """A state dict of arrays as if it were a file: numpy's, JAX's, PyTorch's, or anything that converts to an array.

    Raises:
        CheckpointError: A name is not text, or a value is not an array.
    """
    arrays = {}
    for name, value in state.items():
        if not isinstance(name, str):
            raise CheckpointError(f"has a key of type {type(name).__name__}; want the tensors' names")
        arrays[name] = as_array(name, value)
    tensors = {name: TensorInfo(array.shape, array.dtype) for name, array in arrays.items()}
    return TensorFile(tensors, arrays.__getitem__, contextlib.ExitStack())


def as_array(name: str, value: Any) -> np.ndarray:
    """A numpy array of the same numbers.

    Raises:
        CheckpointError: It is not an array of numbers.
    """
    try:
        try:
            array = np.asarray(value)
        except TypeError:  # PyTorch's bfloat16, which numpy does not know
            array = np.asarray(jnp.from_dlpack(value))
    except (AttributeError, TypeError, ValueError, RuntimeError, BufferError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{quoted(name)} is no array ({first})") from error
    known = array.dtype.kind in "iub" or array.dtype.name in ("float16", "bfloat16", "float32", "float64")
    if not known:
        raise CheckpointError(f"{quoted(name)} is no array of numbers, but of dtype {array.dtype}")
    return array
