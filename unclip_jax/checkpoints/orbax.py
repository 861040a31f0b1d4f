"""Parameters in orbax's format, for object stores and many hosts.

orbax needs memory that the safetensors files do not: writing copies all of the weights, reading a network at a time.
"""

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from unclip_jax.checkpoints.checkpoint import Parameter
from unclip_jax.checkpoints.stream import CODES, Progress

FOLDER = "params"


def write_params(
    folder: Path, params: Mapping[str, Parameter], dtype: np.dtype | None, progress: Progress = lambda nbytes: None
) -> None:
    """Writes `folder`/params. dtype: None keeps each parameter's own. progress: called with bytes handed to orbax."""
    import orbax.checkpoint as ocp

    tree = {}
    for name, param in params.items():
        tree[name] = np.asarray(param.read(), param.dtype if dtype is None else dtype, order="C")
        progress(tree[name].nbytes)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder.absolute() / FOLDER, args=ocp.args.PyTreeSave(tree))


def read_params(folder: Path) -> dict[str, Parameter]:
    """The parameters in `folder`/params. Raises ValueError in one line for a broken folder."""
    import orbax.checkpoint as ocp

    path = folder.absolute() / FOLDER
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    try:
        found = dict(checkpointer.metadata(path).item_metadata.tree)
        shapes = {name: (tuple(info.shape), np.dtype(info.dtype)) for name, info in found.items()}
    except Exception as error:  # orbax and tensorstore raise whatever went wrong inside
        raise ValueError(f"{folder.name}/{FOLDER}: not an orbax checkpoint of named arrays: {_line(error)}") from error
    for name, (_, dtype) in shapes.items():
        if dtype.name not in CODES:
            raise ValueError(f"{folder.name}/{FOLDER}: {name} has dtype {dtype}; accepted: {', '.join(CODES)}")

    @functools.lru_cache(maxsize=1)  # parameters are asked for network by network, and each request costs orbax 20 ms
    def network(component: str) -> dict[str, np.ndarray]:
        names = [name for name in shapes if name.split(".")[0] == component]
        arguments = ocp.args.PyTreeRestore(
            item=dict.fromkeys(names, np.zeros(0)),
            restore_args=dict.fromkeys(names, ocp.RestoreArgs(restore_type=np.ndarray)),
            partial_restore=True,
        )
        try:
            return dict(checkpointer.restore(path, args=arguments))
        except Exception as error:
            raise ValueError(f"{folder.name}/{FOLDER}: {component}: {_line(error)}") from error

    def read(name: str) -> np.ndarray:
        return network(name.split(".")[0])[name]

    return {name: Parameter(*shapes[name], (functools.partial(read, name),)) for name in shapes}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
