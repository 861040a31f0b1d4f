"""Files with the tensors of published checkpoints, whose numbers are holes."""

import json
import math

from tests.golden_weights import GOLDEN, inventory
from unclip_jax.checkpoints.stream import CODES


def write_holes(path, tensors):
    """A safetensors file of the real size that takes no room."""
    header, end = {}, 0
    for name, (shape, dtype) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        code = CODES.get(dtype.name) or {"int64": "I64", "int32": "I32", "bool": "BOOL"}[dtype.name]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)


def shapes(name):
    return {key: (info.shape, info.dtype) for key, info in inventory(GOLDEN / "inventory" / f"{name}.tsv.gz").items()}
