"""The parameters of our directories in orbax's format: a flat tree of named arrays.

Written through orbax, a few parameters in memory at a time; read through tensorstore, which orbax stores arrays with.
"""

import functools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax.checkpoints.checkpoint import Parameter
from unclip_jax.checkpoints.networks import is_stacked
from unclip_jax.checkpoints.nonfinite import cast, warn_unless_finite
from unclip_jax.checkpoints.stream import CODES, Progress
from unclip_jax.checkpoints.strict_json import read_object

FOLDER = "params"
BATCH_BYTES = 1 << 26  # written together, and of a larger array compressed together


def write_params(
    folder: Path, params: Mapping[str, Parameter], dtype: np.dtype | None, progress: Progress = lambda nbytes: None
) -> None:
    """Writes `folder`/params.

    Args:
        folder: The checkpoint's directory.
        params: The parameters to write.
        dtype: The dtype to write; None keeps each parameter's own.
        progress: Called with the number of bytes written.

    Raises:
        OSError: orbax cannot write, for whatever reason.
    """
    import orbax.checkpoint as ocp

    class FewAtATime(ocp.type_handlers.NumpyHandler):
        """Reads parameters as it writes them; orbax's own handler holds copies of all."""

        async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
            waiting: list[tuple[np.ndarray, Any]] = []
            nbytes = 0
            for parameter, info in zip(values, infos, strict=True):
                array = cast(info.name, parameter.read(), parameter.dtype if dtype is None else dtype)
                waiting.append((array, info))
                nbytes += array.nbytes
                if nbytes >= BATCH_BYTES:
                    await self.write(waiting)
                    waiting, nbytes = [], 0
            await self.write(waiting)
            return []

        async def write(self, batch: list[tuple[np.ndarray, Any]]) -> None:
            arrays, infos = [array for array, _ in batch], [info for _, info in batch]
            settings = [ocp.SaveArgs(chunk_byte_size=BATCH_BYTES)] * len(batch)
            try:
                for part in await super().serialize(arrays, infos, settings):
                    part.result()
            except ValueError as error:  # tensorstore's, for every failure of the disk
                raise OSError(f"cannot write to {folder.parent}: {_line(error)}") from error
            progress(sum(array.nbytes for array in arrays))

    handlers = ocp.type_handlers.create_type_handler_registry((Parameter, FewAtATime(deepcopy_host_arrays=False)))
    with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=handlers)) as checkpointer:
        checkpointer.save(folder.absolute() / FOLDER, args=ocp.args.PyTreeSave(dict(params)))


def read_params(folder: Path) -> dict[str, Parameter]:
    """The parameters in `folder`/params, to be read from the disk on demand.

    Raises:
        ValueError: The folder is broken.
    """
    where = f"{folder.name}/{FOLDER}"
    metadata: Any = read_object(folder / FOLDER / "_METADATA")
    try:
        names = [entry["key_metadata"][0]["key"] for entry in metadata["tree_metadata"].values()]
        if not all(isinstance(name, str) for name in names):
            raise TypeError
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{where}: the _METADATA lists no named arrays") from error
    params = {}
    for name in names:
        array = _open(folder, name)
        kind = array.dtype.name
        if kind not in CODES:
            raise ValueError(f"{where}: {name} has dtype {kind}; accepted: {', '.join(CODES)}")
        shape = tuple(array.shape)
        read = functools.partial(_read, folder, name, array)
        layers = range(shape[0]) if is_stacked(name) and shape else (None,)
        params[name] = Parameter(shape, array.dtype.numpy_dtype, tuple(functools.partial(read, i) for i in layers))
    return params


def _open(folder: Path, name: str) -> Any:
    import tensorstore

    base = (folder / FOLDER).absolute().as_uri()
    spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": f"{base}/", "path": f"{name}/"}}
    try:
        return tensorstore.open(spec, open=True, read=True).result()
    except (ValueError, OSError) as error:
        raise ValueError(f"{folder.name}/{FOLDER}: {name}: {_line(error)}") from error


def _read(folder: Path, name: str, array: Any, layer: int | None) -> np.ndarray:
    try:
        whole_or_layer = array if layer is None else array[layer : layer + 1]
        return warn_unless_finite(name, whole_or_layer.read(order="C").result())
    except (ValueError, OSError) as error:
        raise ValueError(f"{folder.name}/{FOLDER}: {name}: {_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps orbax from logging errors that are raised anyway."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
