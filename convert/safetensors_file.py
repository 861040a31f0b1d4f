"""The `.safetensors` format: 8 bytes of header length, a JSON header, then the tensors' bytes without gaps.

https://huggingface.co/docs/safetensors gives the format. Its Python package copies each tensor into memory; here they
stay views of the mapped file.
"""

import contextlib
import mmap
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.tensor_file import (
    JSON_LIMIT,
    CheckpointError,
    TensorFile,
    TensorInfo,
    byte_size,
    is_count,
    map_file,
    mapped_bytes,
    naming,
    parse_json,
    quoted,
)

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


def open_safetensors(path: Path) -> TensorFile:
    """Opens a `.safetensors` file and checks its whole header; reads no tensor data.

    Args:
        path: The file.

    Returns:
        The open file.

    Raises:
        CheckpointError: The file is damaged or something else. The message names the file and the tensor.
    """
    with naming(path), contextlib.ExitStack() as resources:
        mapping = map_file(path, resources)
        header, start = _header(mapping)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise CheckpointError("__metadata__: want an object of strings")
        tensors, offsets = {}, {}
        for name, entry in header.items():
            tensors[name], offsets[name] = _entry(name, entry)
        _check_layout(offsets, len(mapping) - start)

        def read(name: str) -> np.ndarray:
            info = tensors[name]
            begin, end = offsets[name]
            return mapped_bytes(mapping, start + begin, start + end).view(info.dtype).reshape(info.shape)

        return TensorFile(tensors, read, resources.pop_all(), metadata)


def _header(mapping: mmap.mmap) -> tuple[dict[str, Any], int]:
    """The parsed header and where the data begins."""
    length = int.from_bytes(mapping[:8], "little")
    if len(mapping) < 8 or length > len(mapping) - 8:
        raise CheckpointError(f"is truncated: {len(mapping)} bytes, and its header alone takes 8 + {length}")
    if length > JSON_LIMIT:
        raise CheckpointError(f"its header claims {length} bytes; accepted: up to {JSON_LIMIT}")
    header = parse_json(mapping[8 : 8 + length])
    if not isinstance(header, dict):
        raise CheckpointError("its header is not a JSON object")
    return header, 8 + length


def _entry(name: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    """The shape and dtype of one tensor, and where its bytes begin and end in the data."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end], **rest} if not rest:
            numbers = (*shape, begin, end)
        case _:
            raise CheckpointError(f"{quoted(name)}: want dtype, shape and two data_offsets, and nothing else")
    if dtype not in DTYPES:
        raise CheckpointError(f"{quoted(name)}: dtype {quoted(dtype)}; accepted: {', '.join(DTYPES)}")
    if not all(is_count(n) for n in numbers) or begin > end:
        raise CheckpointError(f"{quoted(name)}: want whole numbers from 0 up as shape and data_offsets, in order")
    info = TensorInfo(tuple(shape), DTYPES[dtype])
    try:
        size = byte_size(*info)
    except CheckpointError as error:
        raise CheckpointError(f"{quoted(name)}: {error}") from error
    if size != end - begin:
        raise CheckpointError(
            f"{quoted(name)}: {dtype} {info.shape} takes {size} bytes, its data_offsets {end - begin}"
        )
    return info, (begin, end)


def _check_layout(offsets: dict[str, tuple[int, int]], size: int) -> None:
    """Checks that the tensors fill the data from end to end, with no gap and no overlap."""
    at = 0
    for name, (begin, end) in sorted(offsets.items(), key=lambda item: item[1]):
        if begin != at:
            raise CheckpointError(f"{quoted(name)}: begins at byte {begin} of the data, want {at} (gap or overlap)")
        if end > size:
            raise CheckpointError(f"is truncated: {quoted(name)} ends at byte {end} of the data, which has {size}")
        at = end
    if at != size:
        raise CheckpointError(f"the tensors take {at} bytes, but the file holds {size} after its header")
