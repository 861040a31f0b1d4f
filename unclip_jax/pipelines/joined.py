"""Requests joined into one: what was asked for in calls of their own is made in one batch."""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from unclip_jax.pipelines.request import Request
from unclip_jax.sampling.solvers import Solver


def company(request: Request[Any]) -> Hashable:
    """What requests have to share to be joined: the solver and its steps, sizes, kinds of guidance and of inputs."""
    return _shared(request, 0)


def join(requests: Sequence[Request[Any]]) -> Request[Any]:
    """One request for the images of all, in their order. Each keeps its seeds and indices, and so its noise.

    Args:
        requests: Of one pipeline, with equal `company`.

    Returns:
        The request, whose images run together.

    Raises:
        ValueError: They do not go together.
    """
    if len({company(request) for request in requests}) > 1:
        raise ValueError("requests of several sizes, solvers or kinds of guidance cannot be joined")
    made: Request[Any] = _joined(requests, 0)
    return made


def _shared(value: Any, axis: int) -> Hashable:
    """axis: along which arrays have the images."""
    if isinstance(value, Solver):
        arrays, structure = jax.tree.flatten(value)
        return structure, tuple((np.shape(array), np.asarray(array).tobytes()) for array in arrays)
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape[:axis], value.shape[axis + 1 :]
    if isinstance(value, list):
        return list  # of what each prompt or image has
    if isinstance(value, Mapping):
        return tuple((key, _shared(value[key], axis)) for key in sorted(value))
    if dataclasses.is_dataclass(value):
        fields = [field for field in dataclasses.fields(value) if not field.metadata.get("added")]
        return type(value), tuple(_shared(getattr(value, field.name), _axis(field)) for field in fields)
    if isinstance(value, tuple):
        return tuple(_shared(part, axis) for part in value)
    assert isinstance(value, Hashable)
    return value


def _joined(values: Sequence[Any], axis: int) -> Any:
    first = values[0]
    if isinstance(first, Solver):
        return first
    if isinstance(first, np.ndarray):
        return np.concatenate(values, axis)
    if isinstance(first, list):
        return [part for value in values for part in value]
    if isinstance(first, Mapping):
        return {key: _joined([value[key] for value in values], axis) for key in first}
    if dataclasses.is_dataclass(first):
        made: Any = first
        changes = {}
        for field in dataclasses.fields(first):
            of_each = [getattr(value, field.name) for value in values]
            changes[field.name] = sum(of_each) if field.metadata.get("added") else _joined(of_each, _axis(field))
        return dataclasses.replace(made, **changes)
    if isinstance(first, tuple):
        parts = [_joined(part, axis) for part in zip(*values, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
    return first


def _axis(field: "dataclasses.Field[Any]") -> int:
    axis: int = field.metadata.get("axis", 0)
    return axis
