"""Torch checkpoints (`.ckpt`, `.pt`, `.pth`, `.bin`, `.th`): a zip of one pickle and the raw numbers it points to.

torch.save stores its records uncompressed, so tensors are views of the mapped file here, too. Nothing is unpacked or
executed.
"""

import contextlib
import dataclasses
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from convert.tensor_file import CheckpointError, TensorFile, TensorInfo, map_file, naming, quoted, strided_view
from convert.torch_pickle import StoredTensor, interpret
from convert.zip_directory import Record, read_directory, verify


@dataclasses.dataclass(frozen=True)
class Archive:
    """A mapped torch file: its pickle's bytes and its storage records by key."""

    mapping: mmap.mmap
    pickle: np.ndarray
    storages: dict[str, Record]

    def load(self, rebuild: Callable[[StoredTensor], Any]) -> Any:
        return interpret(self.pickle, {key: r.end - r.start for key, r in self.storages.items()}, rebuild)

    def view(self, tensor: StoredTensor) -> np.ndarray:
        record = self.storages[tensor.storage.key]
        info = TensorInfo(tensor.shape, tensor.storage.dtype)
        return strided_view(self.mapping, (record.start, record.end), info, tensor.offset, tensor.strides)


def open_torch(path: Path) -> TensorFile:
    """Opens a torch file with a dict of tensors, bare or under "state_dict"; reads no tensor data.

    Other contents of the dicts are left out. A storage's checksum is compared when it is first read.

    Args:
        path: The file.

    Returns:
        The open file.

    Raises:
        CheckpointError: The file is damaged, hostile or of another kind.
    """
    with naming(path), contextlib.ExitStack() as resources:
        archive = _open_archive(path, resources)
        content = archive.load(lambda tensor: tensor)
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
        found = content.items() if isinstance(content, dict) else ()
        stored = {name: t for name, t in found if isinstance(name, str) and isinstance(t, StoredTensor)}
        if not stored:
            raise CheckpointError('holds no tensors by name, neither at its top nor under "state_dict"')
        for name, tensor in stored.items():
            try:
                archive.view(tensor)
            except CheckpointError as error:
                raise CheckpointError(f"{quoted(name)}: {error}") from error
        whole: set[str] = set()

        def read(name: str) -> np.ndarray:
            tensor = stored[name]
            key = tensor.storage.key
            if key not in whole:
                with naming(path):
                    verify(archive.mapping, archive.storages[key], f"the data of {quoted(name)}")
                whole.add(key)
            return np.asarray(archive.view(tensor), order="C")

        tensors = {name: TensorInfo(t.shape, t.storage.dtype) for name, t in stored.items()}
        return TensorFile(tensors, read, resources.pop_all())


def load_torch(path: Path) -> Any:
    """The object in a torch file, with read-only arrays (views of the file, strided as they were) for tensors.

    Raises:
        CheckpointError: The file is damaged, hostile or of another kind.
    """
    with naming(path), contextlib.ExitStack() as resources:
        archive = _open_archive(path, resources)
        for key, record in archive.storages.items():
            verify(archive.mapping, record, f"storage record {quoted(key)}")
        return archive.load(archive.view)


def _open_archive(path: Path, resources: contextlib.ExitStack) -> Archive:
    mapping = map_file(path, resources)
    records = read_directory(mapping)
    pickles = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(f"is a zip file, but not one of torch's: {len(pickles)} records named */data.pkl, want 1")
    root = pickles[0].removesuffix("data.pkl")
    if root + "constants.pkl" in records:
        raise CheckpointError(
            "is a TorchScript program, not a state dict: in torch, save the tensors alone with "
            "torch.save(torch.jit.load(file).state_dict(), new_file)"
        )
    packed = next((name for name, record in records.items() if not record.plain), None)
    if packed is not None:
        raise CheckpointError(f"record {quoted(packed)} is compressed or encrypted; torch stores its records plainly")
    if root + "byteorder" in records:
        order = verify(mapping, records[root + "byteorder"], "record 'byteorder'")[:8].tobytes()
        if order != b"little":
            raise CheckpointError(f"its byte order is {order!r}; accepted: little-endian files")
    pickle = verify(mapping, records[root + "data.pkl"], "its pickle")
    storages = {n.removeprefix(root + "data/"): r for n, r in records.items() if n.startswith(root + "data/")}
    return Archive(mapping, pickle, storages)
