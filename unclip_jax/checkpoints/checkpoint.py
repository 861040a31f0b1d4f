"""An open checkpoint, wherever it came from: its configuration, and its parameters one by one under our names."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax.checkpoints.config import (
    AnyConfig,
    BareConfig,
    CheckpointConfig,
    ClipConfig,
    ControlNetCheckpointConfig,
    PriorCheckpointConfig,
    Task,
    TinyVAECheckpointConfig,
)
from unclip_jax.conditioning.tokenizer import Tokenizer
from unclip_jax.models.configs import AutoencoderTinyConfig, ControlNetConfig


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of a checkpoint. Its `pieces` concatenate along the first axis to `shape`, in order.

    A parameter is one piece unless it stacks layers that its file stores separately. Writing it then needs no more
    memory than one layer.

    Args:
        shape: The whole parameter's shape.
        dtype: Its dtype as read.
        pieces: Functions that read one piece each.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[Callable[[], np.ndarray], ...]

    @classmethod
    def of(cls, array: Any) -> "Parameter":
        """Wraps an array in memory."""
        array = np.asarray(array)
        return cls(array.shape, array.dtype, (lambda: array,))

    def read(self) -> np.ndarray:
        """Reads the whole parameter. A single piece is returned as it is (often a view of the file)."""
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
        """Reads one row of the first axis; if layers are pieces, nothing else is read."""
        return self.pieces[layer]()[0] if len(self.pieces) == self.shape[0] else self.read()[layer]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is open for reading; a context manager that closes its files.

    Args:
        config: What the checkpoint is.
        own_tokenizer: Its tokenizer; None for a ControlNet or a tiny autoencoder, which have none.
        params: "component.name" -> Parameter, for every parameter of the configured networks.
        source: Where it came from, for messages.
        files: The files that it was read from, for provenance.
        resources: What to close at the end.

    Raises:
        ValueError: The tokenizer has more ids than the text encoder has embeddings.
    """

    config: AnyConfig
    own_tokenizer: Tokenizer | None
    params: Mapping[str, Parameter]
    source: str
    files: tuple[Any, ...] = ()
    resources: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)

    def __post_init__(self) -> None:
        if self.own_tokenizer is None or isinstance(self.config, BareConfig):
            return
        ids, rows = self.own_tokenizer.vocabulary_size, self.config.text_encoder.vocab_size
        if ids > rows:
            raise ValueError(f"{self.source}: the tokenizer has ids up to {ids - 1}, the text encoder only {rows} rows")

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exc: object) -> None:
        self.resources.close()

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            ValueError: The checkpoint has none.
        """
        if self.own_tokenizer is None:
            raise ValueError(f"{self.source} is {kind_of(self.config)}: it has no tokenizer")
        return self.own_tokenizer

    @property
    def sources(self) -> tuple[str, ...]:
        """`source`, and the files that were read from elsewhere, as another VAE's."""
        own = Path(self.source)
        elsewhere = [str(file) for file in self.files if own not in (Path(file), *Path(file).parents)]
        return tuple(dict.fromkeys((self.source, *elsewhere)))

    @property
    def nbytes(self) -> int:
        return sum(math.prod(p.shape) * p.dtype.itemsize for p in self.params.values())

    def describe(self) -> dict[str, Any]:
        """Describes the checkpoint part by part, in JSON types."""
        parts: dict[str, dict[str, Any]] = {}
        for name, param in self.params.items():
            part = parts.setdefault(name.split(".")[0], {"parameters": 0, "bytes": 0, "dtypes": []})
            part["parameters"] += math.prod(param.shape)
            part["bytes"] += math.prod(param.shape) * param.dtype.itemsize
            if param.dtype.name not in part["dtypes"]:
                part["dtypes"].append(param.dtype.name)
        return {"source": self.source, "parts": parts, "config": dataclasses.asdict(self.config)}


def family_config(checkpoint: Checkpoint) -> CheckpointConfig:
    """The configuration of a Stable Diffusion checkpoint.

    Raises:
        ValueError: The checkpoint is of another kind.
    """
    if isinstance(checkpoint.config, CheckpointConfig):
        return checkpoint.config
    raise ValueError(f"{checkpoint.source} is {kind_of(checkpoint.config)}, not a Stable Diffusion checkpoint")


def task_of(checkpoint: Checkpoint) -> Task:
    """What a Stable Diffusion checkpoint was trained for.

    Raises:
        ValueError: The checkpoint is of another kind, or as in `CheckpointConfig.task`.
    """
    config = family_config(checkpoint)
    try:
        return config.task
    except ValueError as error:
        raise ValueError(f"{checkpoint.source}: {error}") from error


def prior_config(checkpoint: Checkpoint) -> PriorCheckpointConfig:
    """The configuration of a prior's checkpoint.

    Raises:
        ValueError: The checkpoint is of another kind.
    """
    if isinstance(checkpoint.config, PriorCheckpointConfig):
        return checkpoint.config
    raise ValueError(f"{checkpoint.source} is {kind_of(checkpoint.config)}, not a text-to-image prior")


def controlnet_config(checkpoint: Checkpoint) -> ControlNetConfig:
    """The architecture in a ControlNet's checkpoint.

    Raises:
        ValueError: The checkpoint is of another kind.
    """
    if isinstance(checkpoint.config, ControlNetCheckpointConfig):
        return checkpoint.config.controlnet
    raise ValueError(f"{checkpoint.source} is {kind_of(checkpoint.config)}, not a ControlNet")


def tiny_vae_config(checkpoint: Checkpoint) -> AutoencoderTinyConfig:
    """The architecture in a tiny autoencoder's checkpoint.

    Raises:
        ValueError: The checkpoint is of another kind.
    """
    if isinstance(checkpoint.config, TinyVAECheckpointConfig):
        return checkpoint.config.vae
    raise ValueError(f"{checkpoint.source} is {kind_of(checkpoint.config)}, not a tiny autoencoder")


def kind_of(config: AnyConfig) -> str:
    """What a checkpoint is, in words."""
    match config:
        case ClipConfig():
            return "a CLIP model on its own"
        case PriorCheckpointConfig():
            return "a prior on its own"
        case ControlNetCheckpointConfig():
            return "a ControlNet"
        case TinyVAECheckpointConfig():
            return "a tiny autoencoder"
        case _:
            return "a Stable Diffusion checkpoint"
