"""The interface of every reader of foreign checkpoints, and what the readers share."""

import contextlib
import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from unclip_jax.checkpoints import strict_json

JSON_LIMIT = strict_json.LIMIT
EXPANDED_LIMIT = 2**26  # bytes that a view may hold beyond its storage: torch's expand() repeats without storing
MAX_DIMENSIONS = 32
MAX_BYTES = 2**48


class CheckpointError(ValueError):
    """A file is refused; one line names the file and, if there is one, the tensor."""


class TensorInfo(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype


class TensorFile:
    """The tensors of an open checkpoint by name; a context manager that closes its files.

    Attributes:
        tensors: name -> shape and dtype, known without reading any data.
        metadata: The file's own notes (safetensors).
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        read: Callable[[str], np.ndarray],
        resources: contextlib.ExitStack,
        metadata: Mapping[str, str] | None = None,
    ):
        self.tensors = tensors
        self.metadata = metadata or {}
        self._read: Callable[[str], np.ndarray] | None = read
        self._resources = resources

    def read(self, name: str) -> np.ndarray:
        """One tensor, C-contiguous, and read-only if it is a view of the mapped file (it outlives `close`).

        Raises:
            CheckpointError: The data is damaged.
            ValueError: There is no such tensor, or the file is closed.
        """
        if self._read is None:
            raise ValueError(f"{quoted(name)} is read from a checkpoint that is closed")
        if name not in self.tensors:
            raise ValueError(f"the checkpoint holds no tensor {quoted(name)}")
        return self._read(name)

    def close(self) -> None:
        self._read = None  # it holds the mapped file
        self._resources.close()

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Prefixes errors inside the block with the file's name, or another, unless they have it."""
    try:
        yield
    except CheckpointError as error:
        if str(error).startswith(f"{path}: "):
            raise
        raise CheckpointError(f"{path}: {error}") from error


def quoted(text: str, limit: int = 120) -> str:
    """A name from a file, safe to print: no line breaks, not too long."""
    return repr(text if len(text) <= limit else text[:limit] + "…")


def open_file(path: Path) -> BinaryIO:
    """Opens a file for reading.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It is not a readable, non-empty file.
    """
    try:
        if not path.exists():
            raise FileNotFoundError(f"no such file: {path}")
        if not path.is_file():  # never open a pipe or a device: it may block
            raise CheckpointError("is not a file")
        if not path.stat().st_size:
            raise CheckpointError("is empty")
        return path.open("rb")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error.strerror})") from error


def map_file(path: Path, resources: contextlib.ExitStack) -> mmap.mmap:
    """The whole file, mapped read-only until `resources` closes. Raises the errors of `open_file`."""
    with open_file(path) as file:
        try:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot be mapped into memory ({error})") from error
    resources.callback(_unmap, mapping)
    return mapping


def _unmap(mapping: mmap.mmap) -> None:
    # Arrays that still view the file keep it mapped; the last of them releases it.
    with contextlib.suppress(BufferError):
        mapping.close()


def mapped_bytes(mapping: mmap.mmap, start: int, end: int) -> np.ndarray:
    """The bytes [start, end) of the file as a read-only view (uint8)."""
    # Only frombuffer holds on to the mapping: np.ndarray(buffer=mapping) would let it be closed under the array.
    return np.frombuffer(mapping, np.uint8)[start:end]


def is_count(value: object) -> bool:
    """Whether this can be a length or an offset: an integer, not negative, not absurdly large (nor a bool)."""
    return type(value) is int and 0 <= value <= MAX_BYTES


def byte_size(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """The number of bytes of an array.

    Raises:
        CheckpointError: No array can have this shape.
    """
    # Zeros are left out so that (0, 2**60, 2**60), which numpy cannot make either, is refused.
    if len(shape) > MAX_DIMENSIONS or math.prod(n for n in shape if n) * dtype.itemsize > MAX_BYTES:
        raise CheckpointError(
            f"{len(shape)} dimensions, {'×'.join(map(str, shape[:8]))}: no array can be of this shape"
        )
    return math.prod(shape) * dtype.itemsize


def strided_view(
    mapping: mmap.mmap, storage: tuple[int, int], info: TensorInfo, offset: int, strides: tuple[int, ...]
) -> np.ndarray:
    """A read-only view of the mapped bytes storage = (start, end); offset and strides count elements, none negative.

    Raises:
        CheckpointError: It would reach outside the storage, or repeat a small storage too often.
    """
    shape, dtype = info
    start, end = storage
    size = byte_size(shape, dtype)
    if not size:
        return np.empty(shape, dtype)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if (last + 1) * dtype.itemsize > end - start:
        raise CheckpointError(f"shape {shape} with strides {strides} at {offset} reaches outside its storage")
    if size > end - start + EXPANDED_LIMIT:
        raise CheckpointError(f"shape {shape} repeats a storage of {end - start} bytes without measure")
    # An axis of length 1 is never stepped along: its stride may be any number, even one that numpy cannot hold.
    steps = tuple(stride * dtype.itemsize if n > 1 else 0 for n, stride in zip(shape, strides, strict=True))
    return np.ndarray(shape, dtype, mapped_bytes(mapping, start, end), offset * dtype.itemsize, steps)


def parse_json(raw: bytes) -> Any:
    """Strict JSON in UTF-8: no key twice in an object.

    Raises:
        CheckpointError: It is anything else.
    """
    try:
        return strict_json.parse_json(raw)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
