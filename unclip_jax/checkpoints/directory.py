"""Our own on-disk format: a directory of config.json, tokenizer.json, provenance.json and indexed safetensors shards.

It is written as a stream under a temporary name and renamed when whole, so that a directory of the final name is always
complete. Tensors have our names and layouts and are read slice by slice from a memory map.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

import unclip_jax
from unclip_jax.checkpoints.checkpoint import Checkpoint, Parameter
from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.checkpoints.networks import abstract_params
from unclip_jax.conditioning.tokenizer import Dialect, Tokenizer

INDEX = "params.safetensors.index.json"
SHARD_BYTES = 4 << 30
CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}

Progress = Callable[[int], None]


def save(
    checkpoint: Checkpoint,
    destination: Path,
    *,
    dtype: np.dtype | None = None,
    provenance: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda nbytes: None,
) -> Path:
    """Writes a checkpoint as a directory. Needs memory for one piece of a parameter at a time.

    dtype: None keeps each parameter's own. provenance: recorded as it is in provenance.json. progress: called with the
    bytes of tensor data written. Raises FileExistsError when `destination` exists; on any failure nothing is left.
    """
    destination = Path(destination)
    with atomic_directory(destination) as partial:
        _write_json(partial / "config.json", checkpoint.config.to_json())
        _write_text(partial / "tokenizer.json", checkpoint.tokenizer.json)
        dtypes = {name: p.dtype if dtype is None else np.dtype(dtype) for name, p in checkpoint.params.items()}
        shards = _split(checkpoint.params, dtypes, shard_bytes)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            shard = f"params-{number:05d}-of-{len(shards):05d}.safetensors"
            _write_shard(partial / shard, {n: checkpoint.params[n] for n in names}, dtypes, progress)
            weight_map |= dict.fromkeys(names, shard)
        total = sum(_nbytes(p, dtypes[n]) for n, p in checkpoint.params.items())
        _write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        recorded = {"converter": f"unclip_jax {unclip_jax.__version__}", "dtype": str(dtype or "as in the source")}
        _write_json(partial / "provenance.json", {**recorded, **(provenance or {})})
    return destination


def is_directory_checkpoint(folder: Path) -> bool:
    """Whether a folder claims to be of this format."""
    return (folder / INDEX).is_file() and (folder / "config.json").is_file()


def open_directory(folder: Path) -> Checkpoint:
    """Opens a directory that `save` wrote. Raises ValueError in one line for a broken or incomplete one."""
    config = CheckpointConfig.from_json(_read_json(folder / "config.json"))
    text = (folder / "tokenizer.json").read_text("utf-8")
    dialect: Dialect = "open_clip" if config.dialect == "original" else "transformers"
    tokenizer = Tokenizer.from_json(text, dialect, context_length=config.text_encoder.context_length)
    weight_map = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(s, str) for s in weight_map.values()):
        raise ValueError(f"{folder.name}/{INDEX}: no weight_map of names")
    wanted = abstract_params(config)
    if weight_map.keys() != wanted.keys():
        odd = sorted(weight_map.keys() ^ wanted.keys())
        raise ValueError(f"{folder.name}/{INDEX}: {len(odd)} missing or unknown parameters: {', '.join(odd[:5])}")
    with contextlib.ExitStack() as stack:
        files = {}
        for shard in sorted(set(weight_map.values())):
            if Path(shard).name != shard:
                raise ValueError(f"{folder.name}/{INDEX}: shard {shard!r} is not a plain file name")
            try:
                files[shard] = stack.enter_context(safe_open(folder / shard, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{folder.name}/{shard}: {error}") from error
        params = {}
        for name, spec in wanted.items():
            file = files[weight_map[name]]
            try:
                view = file.get_slice(name)
            except SafetensorError as error:
                raise ValueError(f"{folder.name}/{weight_map[name]}: {error}") from error
            if tuple(view.get_shape()) != spec.shape:
                raise ValueError(f"{folder.name}: {name} has shape {view.get_shape()}, want {list(spec.shape)}")
            code = view.get_dtype()
            if code not in CODES.values():
                raise ValueError(f"{folder.name}: {name} has dtype {code}; accepted: {', '.join(CODES.values())}")
            dtype = next(np.dtype(n) for n, c in CODES.items() if c == code)
            params[name] = Parameter(spec.shape, dtype, (functools.partial(file.get_tensor, name),))
        return Checkpoint(config, tokenizer, params, str(folder), (folder,), stack.pop_all())


@contextlib.contextmanager
def atomic_directory(destination: Path) -> Iterator[Path]:
    """A temporary directory that becomes `destination` when the block ends well, and vanishes when it does not.

    Raises FileExistsError when `destination` exists. What earlier runs left behind when they were killed is removed.
    """
    destination = destination.absolute()
    if destination.exists():
        raise FileExistsError(f"{destination} exists; choose another name or remove it")
    destination.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{destination.name}.partial-"
    for leftover in destination.parent.glob(f"{prefix}*"):
        if not _alive(leftover.name.removeprefix(prefix)):
            shutil.rmtree(leftover, ignore_errors=True)
    partial = destination.parent / f"{prefix}{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        _sync(partial)
        os.rename(partial, destination)
        _sync(destination.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def sha256(path: Path, progress: Progress = lambda nbytes: None) -> str:
    """The SHA-256 of a file, in hex; progress is called with the bytes read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def _alive(pid: str) -> bool:
    if not pid.isdigit() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _split(params: Mapping[str, Parameter], dtypes: Mapping[str, np.dtype], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, param in params.items():
        nbytes = _nbytes(param, dtypes[name])
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def _write_shard(
    path: Path, params: Mapping[str, Parameter], dtypes: Mapping[str, np.dtype], progress: Progress
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "unclip_jax"}}
    offset = 0
    for name, param in params.items():
        end = offset + _nbytes(param, dtypes[name])
        code = CODES[dtypes[name].name]
        header[name] = {"dtype": code, "shape": list(param.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, param in params.items():
            for piece in param.pieces:
                array = np.ascontiguousarray(piece(), dtype=dtypes[name])
                # bfloat16 has no buffer protocol; its bytes do.
                file.write(array.reshape(-1).view(np.uint8).data)
                progress(array.nbytes)
        file.flush()
        os.fsync(file.fileno())


def _nbytes(param: Parameter, dtype: np.dtype) -> int:
    return math.prod(param.shape) * dtype.itemsize


def _write_json(path: Path, data: Any) -> None:
    _write_text(path, json.dumps(data, indent=2, sort_keys=True) + "\n")


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _read_json(path: Path) -> Any:
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent.name}/{path.name}: missing") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.parent.name}/{path.name}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path.parent.name}/{path.name}: want a JSON object")
    return data


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
