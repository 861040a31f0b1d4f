"""Our own on-disk format: a directory with config.json, tokenizer.json, provenance.json and the parameters.

The parameters are indexed safetensors shards or, on request, in orbax's format (`unclip_jax.checkpoints.orbax`).
Everything is streamed to a temporary name and renamed when complete, so a directory of the final name is always
complete. Tensors have our names and layouts, and are read slice by slice from a memory map.
"""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open

import unclip_jax
from unclip_jax.checkpoints import orbax
from unclip_jax.checkpoints.atomic import atomic_directory
from unclip_jax.checkpoints.checkpoint import Checkpoint, Parameter
from unclip_jax.checkpoints.config import AnyConfig, BareConfig, read_config
from unclip_jax.checkpoints.networks import abstract_params, is_stacked
from unclip_jax.checkpoints.nonfinite import warn_unless_finite
from unclip_jax.checkpoints.stream import CODES, Progress, nbytes, write_safetensors
from unclip_jax.checkpoints.strict_json import read_bytes, read_object
from unclip_jax.conditioning.tokenizer import Tokenizer

INDEX = "params.safetensors.index.json"
SHARD_BYTES = 4 << 30


def save(
    checkpoint: Checkpoint,
    destination: Path,
    *,
    layout: Literal["safetensors", "orbax"] = "safetensors",
    dtype: np.dtype | None = None,
    provenance: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda nbytes: None,
) -> list[Path]:
    """Writes a checkpoint as a directory. Needs memory for one piece of a parameter.

    Args:
        checkpoint: The open checkpoint.
        destination: The directory to create.
        layout: The format of the parameters; "orbax" needs memory for all of them.
        dtype: The dtype to write; None keeps each parameter's own.
        provenance: Written as it is to provenance.json.
        shard_bytes: The size at which a new shard begins.
        progress: Called with the number of bytes of tensor data written.

    Returns:
        The directory's path, in a list of one.

    Raises:
        FileExistsError: `destination` exists. On this and any other failure nothing is left behind.
    """
    destination = Path(destination)
    with atomic_directory(destination) as partial:
        _write_json(partial / "config.json", checkpoint.config.to_json())
        if checkpoint.own_tokenizer is not None:
            _write_text(partial / "tokenizer.json", checkpoint.own_tokenizer.json)
        if layout == "orbax":
            orbax.write_params(partial, checkpoint.params, dtype, progress)
        else:
            _write_shards(partial, checkpoint.params, dtype, shard_bytes, progress)
        recorded = {"converter": f"unclip_jax {unclip_jax.__version__}", "dtype": str(dtype or "as in the source")}
        _write_json(partial / "provenance.json", {**recorded, **(provenance or {})})
    return [destination]


def is_directory_checkpoint(folder: Path) -> bool:
    """Whether a folder claims to have this format."""
    return (folder / "config.json").is_file() and ((folder / INDEX).is_file() or (folder / orbax.FOLDER).is_dir())


def open_directory(folder: Path) -> Checkpoint:
    """Opens a directory that `save` wrote.

    Args:
        folder: The directory.

    Returns:
        The open checkpoint.

    Raises:
        ValueError: The directory is broken or incomplete.
    """
    config = read_config(read_object(folder / "config.json"))
    tokenizer = _open_tokenizer(config, folder / "tokenizer.json")
    wanted = abstract_params(config)
    with contextlib.ExitStack() as stack:
        params = _open_shards(stack, folder) if (folder / INDEX).is_file() else orbax.read_params(folder)
        if params.keys() != wanted.keys():
            odd = sorted(params.keys() ^ wanted.keys())
            raise ValueError(f"{folder.name}: {len(odd)} missing or unknown parameters: {', '.join(odd[:5])}")
        for name, spec in wanted.items():
            if params[name].shape != spec.shape:
                raise ValueError(f"{folder.name}: {name} has shape {params[name].shape}; want {spec.shape}")
        return Checkpoint(config, tokenizer, params, str(folder), (folder,), stack.pop_all())


def _open_tokenizer(config: AnyConfig, path: Path) -> Tokenizer | None:
    if isinstance(config, BareConfig):
        return None
    try:
        text = read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.parent.name}/{path.name}: not UTF-8 ({error})") from error
    return Tokenizer.from_json(text, config.tokenizer_dialect, config.text_encoder.context_length)


def _open_shards(stack: contextlib.ExitStack, folder: Path) -> dict[str, Parameter]:
    weight_map = read_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(s, str) for s in weight_map.values()):
        raise ValueError(f"{folder.name}/{INDEX}: no weight_map of names")
    files = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise ValueError(f"{folder.name}/{INDEX}: shard {shard!r} is not a plain file name")
        try:
            files[shard] = stack.enter_context(safe_open(folder / shard, framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder.name}/{shard}: {error}") from error
    params = {}
    for name, shard in weight_map.items():
        try:
            view = files[shard].get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{folder.name}/{shard}: {error}") from error
        shape, code = tuple(view.get_shape()), view.get_dtype()
        if code not in CODES.values():
            raise ValueError(f"{folder.name}: {name} has dtype {code}; accepted: {', '.join(CODES.values())}")
        dtype = next(np.dtype(n) for n, c in CODES.items() if c == code)
        pieces: tuple[Callable[[], np.ndarray], ...] = (functools.partial(_tensor, files[shard], name),)
        if is_stacked(name) and shape:
            pieces = tuple(functools.partial(_layer, view, name, layer) for layer in range(shape[0]))
        params[name] = Parameter(shape, dtype, pieces)
    return params


def _tensor(file: Any, name: str) -> np.ndarray:
    return warn_unless_finite(name, file.get_tensor(name))


def _layer(view: Any, name: str, layer: int) -> np.ndarray:
    return warn_unless_finite(name, view[layer : layer + 1])


def sha256(path: Path, progress: Progress = lambda nbytes: None) -> str:
    """The SHA-256 of a file, in hex. progress is called with the number of bytes read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def _write_shards(
    folder: Path, params: Mapping[str, Parameter], dtype: np.dtype | None, limit: int, progress: Progress
) -> None:
    shards = _split(params, dtype, limit)
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, 1):
        shard = f"params-{number:05d}-of-{len(shards):05d}.safetensors"
        part = {name: params[name] for name in names}
        total += write_safetensors(folder / shard, part, dtype, {"format": "unclip_jax"}, progress)
        weight_map |= dict.fromkeys(names, shard)
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _split(params: Mapping[str, Parameter], dtype: np.dtype | None, limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, param in params.items():
        more = nbytes(param, dtype)
        if shards[-1] and size + more > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += more
    return shards


def _write_json(path: Path, data: Any) -> None:
    _write_text(path, json.dumps(data, indent=2, sort_keys=True) + "\n")


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
