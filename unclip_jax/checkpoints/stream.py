"""Streams safetensors files to the disk: at most one piece of one tensor is in memory at a time."""

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax.checkpoints.checkpoint import Parameter
from unclip_jax.checkpoints.nonfinite import cast

# numpy's names and safetensors' codes of the dtypes that weights come in.
CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}

Progress = Callable[[int], None]


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Parameter],
    dtype: np.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Progress = lambda nbytes: None,
) -> int:
    """Writes and syncs `path`.

    Args:
        path: The file to write.
        tensors: name -> tensor.
        dtype: The dtype to write; None keeps each tensor's own.
        metadata: The file's `__metadata__`.
        progress: Called with the number of bytes written.

    Returns:
        The number of bytes of tensor data.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + nbytes(tensor, dtype)
        code = CODES[(tensor.dtype if dtype is None else dtype).name]
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, tensor in tensors.items():
            for piece in tensor.pieces:
                array = cast(name, piece(), tensor.dtype if dtype is None else dtype)
                # bfloat16 has no buffer protocol; its bytes do.
                file.write(array.reshape(-1).view(np.uint8).data)
                progress(array.nbytes)
        file.flush()
        os.fsync(file.fileno())
    return offset


def nbytes(tensor: Parameter, dtype: np.dtype | None = None) -> int:
    """The number of bytes that a tensor takes in a file, in its own dtype or another."""
    return math.prod(tensor.shape) * (tensor.dtype if dtype is None else dtype).itemsize
