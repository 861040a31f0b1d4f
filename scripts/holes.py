"""Checkpoints that are all header: safetensors files of the real size that take no room."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from unclip_jax.checkpoints.stream import CODES

Tensors = Mapping[str, tuple[tuple[int, ...], np.dtype]]

INTEGERS = {"int64": "I64", "int32": "I32", "bool": "BOOL"}


def write_holes(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a file of tensors that read as zeros. tensors: name -> shape and dtype."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, (shape, dtype) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        code = (CODES | INTEGERS)[dtype.name]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
