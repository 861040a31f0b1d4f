"""Files that a reader takes, and what it does with those that were changed."""

import contextlib
import json
import tempfile
from pathlib import Path

import ml_dtypes
import pytest
from flax.serialization import to_bytes

from convert.readers import CheckpointError, load_pickle, open_tensors
from tests.convert.torch_files import ARRAY, mapping, tensor, torch_bytes, write


def refused(path, *words, opener=open_tensors):
    """The file is refused in one line that begins with its name and holds these words."""
    with pytest.raises(CheckpointError) as caught:
        opener(path)
    message = str(caught.value)
    assert message.startswith(str(path.parent))
    assert "\n" not in message
    assert len(message) < 700
    for word in words:
        assert word in message, message


def safetensors_bytes(header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


VALID = {
    "a.safetensors": safetensors_bytes(
        {"w": entry(shape=(3, 4), offsets=(0, 48)), "__metadata__": {"a": "b"}}, ARRAY.tobytes()
    ),
    "a.pt": torch_bytes(mapping({"state_dict": mapping({"w": tensor(), "v": tensor(shape=(4, 3), strides=(1, 4))})})),
    "wide.pt": torch_bytes(mapping({"w": tensor()}), zip64=True),
    "index.json": b'{"weight_map": {"w": "one.bin", "v": "one.bin"}}',
    "a.msgpack": to_bytes({"conv_in": {"kernel": ARRAY, "bias": ARRAY[0].astype(ml_dtypes.bfloat16)}, "w": ARRAY[0]}),
}


def survives(content, suffix):
    """Opens and reads a file whatever it holds; nothing but CheckpointError may come out."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "one.bin", VALID["a.pt"])
        path = write(Path(folder) / f"a{suffix}", content)
        with contextlib.suppress(CheckpointError), open_tensors(path) as file:
            for key, info in file.tensors.items():
                array = file.read(key)
                assert (array.shape, array.dtype) == info
                array.tobytes()
        with contextlib.suppress(CheckpointError):
            load_pickle(path)


def edited(content, edits):
    raw = bytearray(content)
    for place, value in edits:
        raw[int(place * len(raw))] = value
    return bytes(raw)
