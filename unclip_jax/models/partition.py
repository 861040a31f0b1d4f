"""Functions that each device computes for its own images and heads, where the compiler would not split them by itself.

How they are split is decided while a program is traced, by a `shard_map`: no Python runs when the program is compiled,
as it would for `custom_partitioning`. So programs are the same in every process, the disk cache finds them, and they
compile for devices that are not there. The mesh has to be known by then: it is the one that the function runs in
(`jax.set_mesh`, `shard_map`, `pmap`), or else the one on which the program's arguments were placed.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import AxisType, PartitionSpec

# Letter of a rule -> the mesh axis over which it is split.
_MESH_AXES = {"b": "data", "n": "model"}


def over_devices(function: Any, rule: str) -> Any:
    """Splits a function over devices: images over the mesh axis "data", heads over "model".

    An axis that the devices do not divide evenly, and every other axis, is whole on each of them. Where no mesh is
    known, the function is called as it is.

    Args:
        function: Treats each index along b and n on its own.
        rule: The axes of its operands and results, as in "b t n h, b s n h -> b t n h".

    Returns:
        The function, split. A kernel that has no derivative has none in it, either.
    """
    operands, results = ([array.split() for array in side.split(",")] for side in rule.split("->"))

    def on_each_device(*arrays: jax.Array) -> Any:
        mesh = mesh_of(*arrays)
        # In a shard_map over some of the axes, the others are left to be split here.
        free = {
            name: mesh.shape[name]
            for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
            if kind == AxisType.Auto
        }
        if all(size == 1 for size in free.values()):
            return function(*arrays)
        sizes = dict(zip(operands[0], arrays[0].shape, strict=True))
        names = {axis: name for axis, name in _MESH_AXES.items() if name in free and sizes[axis] % free[name] == 0}
        specs, made = ([PartitionSpec(*map(names.get, axes)) for axes in side] for side in (operands, results))
        return jax.shard_map(
            function,
            mesh=mesh,
            in_specs=tuple(specs),
            out_specs=tuple(made) if len(made) > 1 else made[0],
            axis_names=set(free),
            check_vma=False,  # kernels do not say over which axes their results vary
        )(*arrays)

    # Alone, outside a program, arrays have to be given to one.
    return jax.jit(on_each_device)


def read_weight(x: jax.Array, weight: Any) -> tuple[jax.Array, jax.Array]:
    """A layer's input, and its weight as the layer reads it: of a weight that is split to save memory, the whole.

    The two are tied together, so that the weight is gathered when the input is there. Without that the compiler gathers
    all weights of a network at once: at its beginning, or once for all steps of a loop.

    Args:
        x: What the layer multiplies the weight with.
        weight: Its metadata `whole` has the sharding in which the layer reads it; see
            `unclip_jax.checkpoints.placement.shard_weights`. Without it nothing is done.
    """
    whole = weight.get_metadata().get("whole")
    if whole is None:
        return x, weight[...]
    x, split = jax.lax.optimization_barrier((x, weight[...]))
    return x, jax.lax.with_sharding_constraint(split, whole)


def folding_vmap(function: Any) -> Any:
    """The same function, whose first axis becomes larger under vmap; without a gradient.

    Args:
        function: Of arrays whose first axis is the batch, and so are its results'.

    Returns:
        The function.
    """
    batched = custom_vmap(function)

    @batched.def_vmap
    def fold(size: int, mapped: list[bool], *operands: jax.Array) -> Any:
        every = [a if m else jnp.broadcast_to(a, (size, *a.shape)) for a, m in zip(operands, mapped, strict=True)]
        out = batched(*[a.reshape(-1, *a.shape[2:]) for a in every])
        return jax.tree.map(lambda a: a.reshape(size, -1, *a.shape[1:]), out), jax.tree.map(lambda _: True, out)

    return batched


def mesh_of(*arrays: jax.Array) -> jax.sharding.AbstractMesh:
    """The mesh that the surrounding program runs on, as far as it is known; empty otherwise."""
    meshes = (jax.sharding.get_abstract_mesh(), *(jax.typeof(array).sharding.mesh for array in arrays))
    return next((mesh for mesh in meshes if not mesh.empty), meshes[0])
