"""Placement of arrays: a mesh of devices, batches over its "data" axis, weights by a table of rules over "model"."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "model")

# Parameter name -> which axis of it is split over "model"; the first match wins and the last row matches everything.
# Inputs of a residual branch are split by output feature and its end by input feature: one reduction a branch. "heads"
# is split over "model", too, but only between attention heads: within one, attention would have to gather them.
PARTITION_RULES: list[tuple[str, tuple[str | None, ...]]] = [
    (r"(text_encoder|image_encoder|prior)\.layers\.(q_proj|k_proj|v_proj)\.kernel", (None, None, "heads")),
    (r"(text_encoder|image_encoder|prior)\.layers\.(q_proj|k_proj|v_proj)\.bias", (None, "heads")),
    (r"(text_encoder|image_encoder|prior)\.layers\.out_proj\.kernel", (None, "heads", None)),
    (r"(text_encoder|image_encoder|prior)\.layers\.fc1\.kernel", (None, None, "model")),
    (r"(text_encoder|image_encoder|prior)\.layers\.fc1\.bias", (None, "model")),
    (r"(text_encoder|image_encoder|prior)\.layers\.fc2\.kernel", (None, "model", None)),
    (r".*\.(to_q|to_k|to_v)\.kernel", (None, "heads")),
    (r".*\.to_out\.kernel", ("heads", None)),
    (r".*\.linear_1\.kernel", (None, "model")),
    (r".*\.(ff\.proj_out|linear_2)\.kernel", ("model", None)),
    (r".*\.(conv1)\.kernel", (None, None, None, "model")),
    (r".*\.(conv2)\.kernel", (None, None, "model", None)),
    (r".*", ()),
]


def local_mesh(devices: Sequence[jax.Device] | None = None, model: int = 1) -> Mesh:
    """A mesh of all local devices (or the given ones) along "data"; of `model` > 1 with a "model" axis of that size.

    Raises:
        ValueError: `model` does not divide the number of devices.
    """
    found = np.asarray(jax.local_devices() if devices is None else devices)
    if model == 1:
        return Mesh(found, ("data",), axis_types=(AxisType.Auto,))
    if not 1 <= model <= found.size or found.size % model:
        raise ValueError(f'"model" is {model}; want a divisor of the number of devices, {found.size}')
    return Mesh(found.reshape(-1, model), AXES, axis_types=(AxisType.Auto,) * 2)


def check_mesh(mesh: Mesh) -> Mesh:
    """The mesh with automatic axes, which let the compiler decide how the networks are split.

    `jax.make_mesh` gives explicit axes, with which every operation would have to decide that.

    Raises:
        ValueError: The axes are not "data" and/or "model", or a mesh of several processes leaves one of them out.
    """
    if not mesh.axis_names or not set(mesh.axis_names) <= set(AXES):
        raise ValueError(f"mesh has axes {mesh.axis_names}; accepted: 'data' and/or 'model'")
    processes = {device.process_index for device in mesh.devices.flat}
    if processes != {jax.process_index()} and len(processes) < jax.process_count():
        raise ValueError(
            f"mesh has devices of processes {sorted(processes)} of {jax.process_count()}, and this is "
            f"{jax.process_index()}; want devices of this process alone, or of all, see docs/devices.md"
        )
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def parameter_sharding(mesh: Mesh, name: str, shape: tuple[int, ...], head_width: int = 1) -> NamedSharding:
    """The sharding of a parameter: split over "model" if the axis in its rule divides evenly, else replicated.

    Args:
        mesh: The mesh.
        name: The parameter's name.
        shape: Its shape.
        head_width: Of its network, see `unclip_jax.checkpoints.networks.head_width`.

    Returns:
        The sharding.
    """
    axes = next(axes for pattern, axes in PARTITION_RULES if re.fullmatch(pattern, name))
    size = mesh.shape.get("model", 1)
    unit = {"model": size, "heads": size * head_width}
    if size == 1 or any(axis is not None and shape[i] % unit[axis] for i, axis in enumerate(axes)):
        axes = ()
    return NamedSharding(mesh, P(*(axis and "model" for axis in axes)))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose first axis is the batch: split over "data"."""
    return NamedSharding(mesh, P("data") if "data" in mesh.axis_names else P())


def fully_sharded(mesh: Mesh, shape: tuple[int, ...], split: P | None = None, first: int = 0) -> NamedSharding:
    """The sharding of an array over all devices: along its longest axis that divides evenly; else as it is split.

    Source: ZeRO's third stage (Rajbhandari et al. 2020, arXiv:1910.02054), which the compiler's partitioning gives.

    Args:
        mesh: The devices.
        shape: The array's.
        split: How it is split already, over some of the mesh's axes; it is split further over the others. None: not.
        first: The first axis along which it may be split.
    """
    split = P() if split is None else split
    names = [*split, *[None] * (len(shape) - len(split))]
    others = tuple(name for name in mesh.axis_names if name not in names)
    parts = math.prod(mesh.shape[name] for name in others)
    sizes = NamedSharding(mesh, split).shard_shape(shape)
    axes = sorted(range(first, len(shape)), key=lambda axis: -sizes[axis])
    axis = next((axis for axis in axes if sizes[axis] >= parts and sizes[axis] % parts == 0), None)
    if axis is None or not others:
        return NamedSharding(mesh, split)
    names[axis] = others if names[axis] is None else (names[axis], *others)
    return NamedSharding(mesh, P(*names[: max(axis + 1, len(split))]))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays that are the same on every device."""
    return NamedSharding(mesh, P())


def data_size(mesh: Mesh) -> int:
    """The number of parts that the batch is split into: batches are padded to a multiple of it."""
    return mesh.shape.get("data", 1)


def placed(tree: Any, sharding: Sharding) -> Any:
    """Arrays that this process has whole, and every other process alike -> on the devices of all.

    Nothing goes from host to host: each takes the parts of its own devices. `jax.device_put` would compare the arrays.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def place(array: Any) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return jax.tree.map(place, tree)


def gathered(tree: Any) -> Any:
    """Arrays on the devices, of other hosts, too -> whole on every host, which all have to call it."""

    def gather(array: Any) -> np.ndarray:
        elsewhere = isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated)
        return np.asarray(multihost_utils.process_allgather(array, tiled=True) if elsewhere else array)

    return jax.tree.map(gather, tree)


def own_part(mesh: Mesh, array: jax.Array) -> np.ndarray:
    """(R, ...) over "data" -> the rows on this host's devices, there: all of them on one host."""
    if array.is_fully_addressable:
        return np.asarray(array)
    array = jax.device_put(array, batch_sharding(mesh))  # where it is already
    parts = {part.index[0].start or 0: part.data for part in array.addressable_shards}
    return np.concatenate([np.asarray(parts[first]) for first in sorted(parts)])


def own_rows(mesh: Mesh, count: int) -> np.ndarray:
    """Which of `count` rows, dealt out one by one over "data", are on this host's devices: all of them on one host."""
    devices = np.moveaxis(mesh.devices, mesh.axis_names.index("data"), 0) if "data" in mesh.axis_names else mesh.devices
    here = [
        any(device.process_index == jax.process_index() for device in part)
        for part in devices.reshape(data_size(mesh), -1)
    ]
    return np.flatnonzero(np.asarray(here)[np.arange(count) % data_size(mesh)])


def pad_batch(tree: Any, size: int) -> Any:
    """Repeats the last row of every array until the first axis has `size` rows."""

    def pad(a: np.ndarray) -> np.ndarray:
        return a if len(a) == size else np.concatenate([a, np.repeat(a[-1:], size - len(a), axis=0)])

    return jax.tree.map(pad, tree)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Images that are made together.

    Attributes:
        mesh: where.
        rows: (R,) int, the images' indices in the call; R is a multiple of the devices, the last index is repeated.
        count: how many of the rows are images.
        prompts: (R,) int, which prompt (or input image) each is of.
        seeds, indices: (R,) uint32 and (R,) int32 on the devices, of the images' keys.
    """

    mesh: Mesh
    rows: np.ndarray
    count: int
    prompts: np.ndarray
    seeds: jax.Array
    indices: jax.Array

    def split(self, array: np.ndarray) -> jax.Array:
        """(R, ...) on the host -> over the devices."""
        return placed(array, batch_sharding(self.mesh))

    def of_images(self, values: np.ndarray) -> jax.Array:
        """(B, ...), one for each image of the call -> (R, ...) over the devices."""
        return self.split(values[self.rows])

    def of_prompts(self, values: np.ndarray) -> jax.Array:
        """(prompts, ...), or (1, ...) for all -> (R, ...) over the devices."""
        return self.split(values[np.minimum(self.prompts, len(values) - 1)])

    def by_call(self, values: np.ndarray) -> jax.Array:
        """(network evaluations, B, ...) -> (network evaluations, R, ...) over the devices."""
        spec = batch_sharding(self.mesh).spec
        return placed(values[:, self.rows], NamedSharding(self.mesh, P(None, *spec)))

    def everywhere(self, tree: Any) -> Any:
        """Arrays that every device has whole."""
        return placed(tree, replicated(self.mesh))

    def trim(self, array: jax.Array) -> np.ndarray:
        """(R, ...) -> (count, ...) on every host."""
        return gathered(array)[: self.count]


def make_chunk(mesh: Mesh, rows: np.ndarray, repeats: int, seeds: np.ndarray, indices: np.ndarray) -> Chunk:
    """The chunk of some of a call's images.

    Args:
        mesh: Where they are made.
        rows: (count,) int, the images' indices in the call.
        repeats: How many neighbours are of one prompt.
        seeds, indices: (B,) uint32 and (B,) int32, of the keys of the call's images.
    """
    size = data_size(mesh)
    padded = pad_batch(rows, -(-len(rows) // size) * size)
    by_batch = batch_sharding(mesh)
    return Chunk(
        mesh=mesh,
        rows=padded,
        count=len(rows),
        prompts=padded // repeats,
        seeds=placed(seeds[padded], by_batch),
        indices=placed(indices[padded], by_batch),
    )
