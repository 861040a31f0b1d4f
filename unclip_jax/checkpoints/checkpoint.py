"""An opened checkpoint, wherever it came from: what it is, and its parameters one by one under our names."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from unclip_jax.checkpoints.config import AnyConfig, CheckpointConfig, ClipConfig, PriorCheckpointConfig
from unclip_jax.conditioning.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of a checkpoint. `pieces` are read in order and concatenate along the first axis to `shape`.

    A parameter is one piece unless it stacks layers that its file keeps apart: then writing it needs no more memory
    than a layer.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[Callable[[], np.ndarray], ...]

    @classmethod
    def of(cls, array: Any) -> "Parameter":
        """One that is in memory."""
        array = np.asarray(array)
        return cls(array.shape, array.dtype, (lambda: array,))

    def read(self) -> np.ndarray:
        """The whole parameter; one piece is returned as it is (often a view of the file)."""
        if len(self.pieces) == 1:
            return self.pieces[0]()
        out = np.empty(self.shape, self.dtype)
        start = 0
        for piece in self.pieces:
            part = piece()
            out[start : start + len(part)] = part
            start += len(part)
        return out

    def read_layer(self, layer: int) -> np.ndarray:
        """One row of the first axis; where layers are pieces, nothing else is read."""
        return self.pieces[layer]()[0] if len(self.pieces) == self.shape[0] else self.read()[layer]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint open for reading; a context manager that closes its files.

    params: "component.name" -> Parameter, for every parameter of `config`'s networks. source: where it came from, for
    people. files: the files that it was read from, for provenance.
    """

    config: AnyConfig
    tokenizer: Tokenizer
    params: Mapping[str, Parameter]
    source: str
    files: tuple[Any, ...] = ()
    resources: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)

    def __post_init__(self) -> None:
        ids, rows = self.tokenizer.vocabulary_size, self.config.text_encoder.vocab_size
        if ids > rows:
            raise ValueError(f"{self.source}: the tokenizer has ids up to {ids - 1}, the text encoder only {rows} rows")

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exc: object) -> None:
        self.resources.close()

    @property
    def nbytes(self) -> int:
        return sum(math.prod(p.shape) * p.dtype.itemsize for p in self.params.values())

    def describe(self) -> dict[str, Any]:
        """What the checkpoint is, part by part, as JSON types."""
        parts: dict[str, dict[str, Any]] = {}
        for name, param in self.params.items():
            part = parts.setdefault(name.split(".")[0], {"parameters": 0, "bytes": 0, "dtypes": []})
            part["parameters"] += math.prod(param.shape)
            part["bytes"] += math.prod(param.shape) * param.dtype.itemsize
            if param.dtype.name not in part["dtypes"]:
                part["dtypes"].append(param.dtype.name)
        return {"source": self.source, "parts": parts, "config": dataclasses.asdict(self.config)}


def family_config(checkpoint: Checkpoint) -> CheckpointConfig:
    """The configuration of a Stable Diffusion checkpoint. Raises ValueError in one line for another kind."""
    if isinstance(checkpoint.config, CheckpointConfig):
        return checkpoint.config
    kind = "a CLIP model" if isinstance(checkpoint.config, ClipConfig) else "a prior"
    raise ValueError(f"{checkpoint.source} is {kind} on its own, not a Stable Diffusion checkpoint")


def prior_config(checkpoint: Checkpoint) -> PriorCheckpointConfig:
    """The configuration of a prior's checkpoint. Raises ValueError in one line for another kind."""
    if isinstance(checkpoint.config, PriorCheckpointConfig):
        return checkpoint.config
    kind = "a CLIP model on its own" if isinstance(checkpoint.config, ClipConfig) else "a Stable Diffusion checkpoint"
    raise ValueError(f"{checkpoint.source} is {kind}, not a text-to-image prior")
