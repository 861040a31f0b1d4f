"""The files of Flax's serialization: one msgpack map of maps, whose leaves are arrays.

https://github.com/msgpack/msgpack/blob/master/spec.md gives the format. An array is written as by flax.serialization:
an extension of type 1 (a scalar: 3) that holds a list of shape, dtype name and bytes; above 1 GiB, a map with a mark,
the shape, and the array in flat pieces. msgpack's own package copies each array; here they stay views of the mapped
file.
"""

import contextlib
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert.safetensors_file import DTYPES
from convert.tensor_file import (
    MAX_DIMENSIONS,
    CheckpointError,
    TensorFile,
    TensorInfo,
    byte_size,
    is_count,
    map_file,
    mapped_bytes,
    naming,
    quoted,
)

DTYPE_NAMES = {dtype.name: dtype for dtype in DTYPES.values()}
ARRAY, SCALAR = 1, 3
CHUNKED = "__msgpack_chunked_array__"
# Far beyond any network; they keep a hostile file from being large in memory or deep on the stack.
ENTRY_LIMIT = 1 << 18
DEPTH_LIMIT = 32
NAME_LIMIT = 512
# First byte -> kind of the value and size in bytes of the number after it, which is a length or the value itself.
_HEADS = {
    0xC0: ("null", 0),
    0xC2: ("false", 0),
    0xC3: ("true", 0),
    0xCA: ("float", 4),
    0xCB: ("float", 8),
    **{0xC4 + i: ("bytes", 1 << i) for i in range(3)},
    **{0xC7 + i: ("extension", 1 << i) for i in range(3)},
    **{0xCC + i: ("integer", 1 << i) for i in range(4)},
    **{0xD0 + i: ("signed integer", 1 << i) for i in range(4)},
    **{0xD9 + i: ("string", 1 << i) for i in range(3)},
    **{0xDC + i: ("list", 2 << i) for i in range(2)},
    **{0xDE + i: ("map", 2 << i) for i in range(2)},
}


class _Array(NamedTuple):
    info: TensorInfo
    place: tuple[int, int]  # its bytes in the file, [start, end)


def open_msgpack(path: Path) -> TensorFile:
    """Opens a `.msgpack` file of Flax and checks its whole structure; reads no array data.

    A tensor's name joins the names of the maps around it with dots: "down_blocks_0.resnets_0.norm1.scale". Files that
    are one part of a model have such names as the keys of one map, with slashes, and get the same names.

    Args:
        path: The file.

    Returns:
        The open file.

    Raises:
        CheckpointError: The file is damaged or something else. The message names the file and the tensor.
    """
    with naming(path), contextlib.ExitStack() as resources:
        mapping = map_file(path, resources)
        scan = _Scan(mapping)
        tree = scan.value("")
        if not isinstance(tree, dict):
            raise CheckpointError("is msgpack, but no map of arrays")
        if scan.at != len(mapping):
            raise CheckpointError(f"goes on after its end: {scan.at} bytes of {len(mapping)} are the map of its arrays")
        tensors: dict[str, TensorInfo] = {}
        places: dict[str, list[tuple[int, int]]] = {}
        for name, info, pieces in _leaves(tree, ""):
            if name in tensors:
                raise CheckpointError(f"{quoted(name)} is there twice")
            tensors[name], places[name] = info, pieces

        def read(name: str) -> np.ndarray:
            shape, dtype = tensors[name]
            pieces = [mapped_bytes(mapping, start, end) for start, end in places[name]]
            return (pieces[0] if len(pieces) == 1 else np.concatenate(pieces)).view(dtype).reshape(shape)

        return TensorFile(tensors, read, resources.pop_all())


def begins_msgpack(head: bytes) -> bool:
    """Whether the first bytes of a file may begin a msgpack map with a string as its first key."""
    if not head or not (0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF)):
        return False
    key = head[{0xDE: 3, 0xDF: 5}.get(head[0], 1) :][:1]
    return b"\xa0" <= key <= b"\xbf" or b"\xd9" <= key <= b"\xdb"


class _Scan:
    """Walks over the values of a mapped file, from its first byte."""

    def __init__(self, mapping: mmap.mmap):
        self.at = 0
        self._mapping = mapping
        self._entries = 0

    def value(self, name: str, depth: int = 0) -> Any:
        """The next value: a dict, an `_Array`, or the other entries of a map of pieces: an int or True."""
        kind, number = self._head()
        match kind:
            case "map":
                return self._map(name, number, depth)
            case "extension":
                return self._array(name, number)
            case "integer":
                return number
            case "true":
                return True
        raise CheckpointError(f"{quoted(name)} is a {kind}; want an array, or a map of arrays")

    def _map(self, name: str, count: int, depth: int) -> dict[str, Any]:
        self._entries += count
        if self._entries > ENTRY_LIMIT:
            raise CheckpointError(f"has more than {ENTRY_LIMIT} entries in its maps")
        if depth == DEPTH_LIMIT:
            raise CheckpointError(f"{quoted(name)}: maps are nested more than {DEPTH_LIMIT} deep")
        entries: dict[str, Any] = {}
        for _ in range(count):
            key = self._string(name)
            if key in entries:
                raise CheckpointError(f"{quoted(_join(name, key))} is there twice")
            entries[key] = self.value(_join(name, key), depth + 1)
        return entries

    def _array(self, name: str, size: int) -> _Array:
        extension = self._take(1)[0]
        if extension not in (ARRAY, SCALAR):
            raise CheckpointError(f"{quoted(name)} is an extension of type {extension}; accepted: {ARRAY} and {SCALAR}")
        end = self.at + size
        if self._head() != ("list", 3):
            raise CheckpointError(f"{quoted(name)}: want an array as a list of shape, dtype and bytes")
        shape = self._shape(name)
        dtype = self._string(name)
        if dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{quoted(name)}: dtype {quoted(dtype)}; accepted: {', '.join(DTYPE_NAMES)}")
        info = TensorInfo(shape, DTYPE_NAMES[dtype])
        kind, length = self._head()
        start = self.at
        if kind != "bytes" or start + length != end:
            raise CheckpointError(f"{quoted(name)}: want bytes that end with the array, {end - start} of them")
        try:
            wanted = byte_size(*info)
        except CheckpointError as error:
            raise CheckpointError(f"{quoted(name)}: {error}") from error
        if length != wanted:
            raise CheckpointError(f"{quoted(name)}: {dtype} {shape} takes {wanted} bytes, it has {length}")
        self._skip(length)
        return _Array(info, (start, end))

    def _shape(self, name: str) -> tuple[int, ...]:
        kind, count = self._head()
        sizes = [self._head() for _ in range(count if count <= MAX_DIMENSIONS else 0)] if kind == "list" else []
        if kind != "list" or len(sizes) < count or not all(k == "integer" and is_count(size) for k, size in sizes):
            raise CheckpointError(f"{quoted(name)}: want a list of up to {MAX_DIMENSIONS} whole numbers as its shape")
        return tuple(size for _, size in sizes)

    def _string(self, name: str) -> str:
        where = quoted(name) if name else "its outermost map"
        kind, length = self._head()
        if kind != "string" or length > NAME_LIMIT:
            shown = f"a string of {length} bytes" if kind == "string" else f"a {kind}"
            raise CheckpointError(f"{where}: want a string of up to {NAME_LIMIT} bytes, here is {shown}")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{where}: holds a string that is not UTF-8") from error

    def _head(self) -> tuple[str, int]:
        """The kind of the next value, and its length, or the number itself."""
        first = self._take(1)[0]
        if first < 0x80:
            return "integer", first
        if first < 0x90:
            return "map", first & 0x0F
        if first < 0xA0:
            return "list", first & 0x0F
        if first < 0xC0:
            return "string", first & 0x1F
        if 0xD4 <= first <= 0xD8:
            return "extension", 1 << (first - 0xD4)
        kind, size = _HEADS.get(first, ("signed integer", 0))
        return kind, int.from_bytes(self._take(size), "big")

    def _take(self, size: int) -> bytes:
        start = self.at
        self._skip(size)
        return self._mapping[start : self.at]

    def _skip(self, size: int) -> None:
        if size > len(self._mapping) - self.at:
            raise CheckpointError(
                f"is truncated: {len(self._mapping)} bytes, and more than {self.at + size} are wanted"
            )
        self.at += size


def _join(prefix: str, key: str) -> str:
    name = f"{prefix}.{key}" if prefix else key
    if len(name) > NAME_LIMIT:
        raise CheckpointError(f"{quoted(name)}: a name of more than {NAME_LIMIT} characters")
    return name.replace("/", ".")


def _leaves(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, TensorInfo, list[tuple[int, int]]]]:
    """Every array under a map: its name, shape and dtype, and where its bytes are."""
    for key, value in tree.items():
        name = _join(prefix, key)
        if isinstance(value, _Array):
            yield name, value.info, [value.place]
        elif not isinstance(value, dict):
            raise CheckpointError(f"{quoted(name)} is {value!r}; want an array, or a map of arrays")
        elif CHUNKED in value:
            yield name, *_in_pieces(name, value)
        else:
            yield from _leaves(value, name)


def _in_pieces(name: str, entry: dict[str, Any]) -> tuple[TensorInfo, list[tuple[int, int]]]:
    match entry:
        case {"shape": dict(shape), "chunks": dict(chunks), **rest} if rest == {CHUNKED: True}:
            sizes: list[Any] = [shape.get(str(i)) for i in range(len(shape))]
            pieces: list[Any] = [chunks.get(str(i)) for i in range(len(chunks))]
        case _:
            raise CheckpointError(f"{quoted(name)}: want an array in pieces as shape and chunks, and nothing else")
    arrays = [piece for piece in pieces if isinstance(piece, _Array)]
    dtypes = {array.info.dtype for array in arrays}
    if len(arrays) < len(pieces) or len(dtypes) != 1 or not all(is_count(size) for size in sizes):
        raise CheckpointError(f"{quoted(name)}: want numbered sizes and pieces of one dtype")
    info = TensorInfo(tuple(sizes), dtypes.pop())
    try:
        wanted = byte_size(*info)
    except CheckpointError as error:
        raise CheckpointError(f"{quoted(name)}: {error}") from error
    held = sum(end - start for _, (start, end) in arrays)
    if held != wanted:
        raise CheckpointError(f"{quoted(name)}: {info.dtype} {info.shape} takes {wanted} bytes, its pieces {held}")
    return info, [array.place for array in arrays]
