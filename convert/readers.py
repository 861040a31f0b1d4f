"""Reads foreign checkpoints without torch: `.safetensors`, torch files, Flax's, and each kind in shards with an index.

A file is recognised by its first bytes; its name does not matter. Tensors stay views of the mapped files.
"""

import contextlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from convert.msgpack_file import begins_msgpack, open_msgpack
from convert.safetensors_file import open_safetensors
from convert.tensor_file import (
    JSON_LIMIT,
    CheckpointError,
    TensorFile,
    TensorInfo,
    naming,
    open_file,
    parse_json,
    quoted,
)
from convert.torch_zip import load_torch, open_torch

__all__ = ["CheckpointError", "TensorFile", "TensorInfo", "load_pickle", "open_tensors", "recognise"]

RESAVE = "in torch, save it again with torch.save(torch.load(file), new_file), or as .safetensors"
REFUSED = {
    "git-lfs": "is a git-lfs pointer, not the file itself: fetch that with `git lfs pull`",
    "html": "is a web page (HTML or XML) saved in the file's place: download it again",
    "legacy": f"is in torch's old form, from before version 1.6: {RESAVE}",
    "tar": f"is in torch's oldest form, a tar file: {RESAVE}",
    "pickle": f"is a bare pickle, not a file of torch.save: {RESAVE}",
    "unknown": "is neither a .safetensors nor a torch file nor one of Flax (.msgpack), nor an index of such files",
}
LEGACY_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")  # torch.serialization's, the first pickle of the file


def open_tensors(path: Path) -> TensorFile:
    """Opens a checkpoint to read its tensors by name, see `TensorFile`.

    Args:
        path: A `.safetensors` file; a torch file (`.ckpt`, `.pt`, `.pth`, `.bin`, `.th`) with a dict of tensors, bare
            or under "state_dict"; a `.msgpack` file of Flax; or the JSON index of a sharded checkpoint, with the shards
            beside it.

    Returns:
        The open file.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is damaged, hostile or something else.
    """
    match recognise(path):
        case "safetensors":
            return open_safetensors(path)
        case "zip":
            return open_torch(path)
        case "msgpack":
            return open_msgpack(path)
        case "json":
            return _open_index(path)
        case other:
            raise CheckpointError(f"{path}: {REFUSED[other]}")


def load_pickle(path: Path) -> Any:
    """The object in a torch file, with read-only numpy arrays for tensors; runs nothing that the file names.

    Objects that are not data, such as classes of training frameworks, become inert placeholders with a `name`.

    Args:
        path: The file.

    Returns:
        The object.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is damaged, hostile or something else.
    """
    match recognise(path):
        case "zip":
            return load_torch(path)
        case "safetensors" | "msgpack" | "json":
            raise CheckpointError(f"{path}: want a torch file (.pt, .pth, .th)")
        case other:
            raise CheckpointError(f"{path}: {REFUSED[other]}")


def recognise(path: Path) -> str:
    """The kind of a file from its first bytes: "safetensors", "zip", "msgpack", "json" or a key of REFUSED."""
    with naming(path), open_file(path) as file:
        head = file.read(512)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    # The header's length comes first in a safetensors file and may look like anything, but its high bytes are zero.
    if head[8:9] == b"{" and head[5:8] == b"\0\0\0":
        return "safetensors"
    if head.startswith(b"PK"):
        return "zip"
    if head.startswith(b"\x80") and LEGACY_MAGIC in head[:16]:
        return "legacy"
    if head.startswith((b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5")):
        return "pickle"
    if head[257:262] == b"ustar":
        return "tar"
    if text.startswith(b"version https://git-lfs"):
        return "git-lfs"
    if text.startswith(b"<"):
        return "html"
    if begins_msgpack(head):
        return "msgpack"
    return "json" if text.startswith(b"{") else "unknown"


def _open_index(path: Path) -> TensorFile:
    """Opens a sharded checkpoint by its index, {"weight_map": {tensor: name of a file beside the index}}."""
    with naming(path):
        with open_file(path) as file:
            index = parse_json(file.read(JSON_LIMIT + 1))
        places = index.get("weight_map")
        if not isinstance(places, dict) or not places:
            raise CheckpointError("is JSON, but no index of a sharded checkpoint: want a non-empty object 'weight_map'")
        for name, shard in places.items():
            if not isinstance(shard, str) or not _is_plain(shard):
                shown = quoted(shard) if isinstance(shard, str) else f"a {type(shard).__name__}"
                raise CheckpointError(f"{quoted(name)}: its shard is {shown}; want the name of a file beside the index")
    # Flax's shards and their index have slashes in their names, for which the reader gives dots.
    places = {name.replace("/", ".") if shard.endswith(".msgpack") else name: shard for name, shard in places.items()}
    with contextlib.ExitStack() as resources:
        shards = {shard: resources.enter_context(_open_shard(path, shard)) for shard in dict.fromkeys(places.values())}
        with naming(path):
            _check_places(places, {shard: file.tensors.keys() for shard, file in shards.items()})

        def read(name: str) -> np.ndarray:
            return shards[places[name]].read(name)

        tensors = {name: shards[shard].tensors[name] for name, shard in places.items()}
        return TensorFile(tensors, read, resources.pop_all())


def _is_plain(name: str) -> bool:
    return bool(name.strip(".")) and len(name) <= 255 and not any(c in name for c in "/\\\0")


def _open_shard(index: Path, shard: str) -> TensorFile:
    path = index.parent / shard
    try:
        kind = recognise(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{index}: its shard {quoted(shard)} is missing") from error
    if kind == "json":
        raise CheckpointError(f"{index}: its shard {quoted(shard)} is an index itself")
    return open_tensors(path)


def _check_places(places: dict[str, str], held: dict[str, Collection[str]]) -> None:
    """Checks that every tensor is in the shard that the index names, and in no other."""
    for name, shard in places.items():
        if name not in held[shard]:
            raise CheckpointError(f"{quoted(name)} is not in {quoted(shard)}, where the index places it")
    for shard, names in held.items():
        for name in names:
            if places.get(name) != shard:
                raise CheckpointError(f"{quoted(shard)} holds {quoted(name)}, which the index does not place there")
