"""Attention that each device computes for its own images and heads, where the compiler would not split it by itself."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec


def over_devices(function: Any, rule: str) -> Any:
    """Splits a function over devices by images and heads, and under vmap over its first axis; without a gradient.

    Args:
        function: Treats each index along b and n on its own. Every device has the other axes whole.
        rule: The axes of its operands and results, as in "b t n h, b s n h -> b t n h".

    Returns:
        The function, partitioned.
    """
    split = custom_partitioning(function)
    operands, results = ([array.split() for array in side.split(",")] for side in rule.split("->"))
    # XLA wants them in the order in which the rule names them.
    every_axis = dict.fromkeys(axis for axes in operands + results for axis in axes)
    whole = tuple(axis for axis in every_axis if axis not in ("b", "n"))

    def partition(mesh: Any, arguments: Any, result: Any) -> Any:
        # Operands may come split each in another way, or along an axis that has to be whole.
        devices: dict[str, Any] = {}
        for axes, array in zip(operands + results, jax.tree.leaves((arguments, result)), strict=True):
            # In a shard_map over some of the axes the others are unknown: each device does all of it.
            for axis, name in zip(axes, getattr(array.sharding, "spec", ()), strict=False):
                if name is not None and axis not in whole and not _names(name) & _names(*devices.values()):
                    devices.setdefault(axis, name)

        def shardings(arrays: list[list[str]]) -> list[NamedSharding]:
            return [NamedSharding(mesh, PartitionSpec(*map(devices.get, axes))) for axes in arrays]

        made = jax.tree.unflatten(jax.tree.structure(result), shardings(results))
        return mesh, function, made, tuple(shardings(operands))

    split.def_partition(partition, sharding_rule=rule, need_replication_factors=whole)
    batched = custom_vmap(split)

    @batched.def_vmap
    def fold(size: int, mapped: list[bool], *operands: jax.Array) -> Any:
        every = [a if m else jnp.broadcast_to(a, (size, *a.shape)) for a, m in zip(operands, mapped, strict=True)]
        out = batched(*[a.reshape(-1, *a.shape[2:]) for a in every])
        return jax.tree.map(lambda a: a.reshape(size, -1, *a.shape[1:]), out), jax.tree.map(lambda _: True, out)

    return batched


def _names(*axes: str | tuple[str, ...]) -> set[str]:
    """The mesh axes in entries of a partition spec."""
    return {name for axis in axes for name in ((axis,) if isinstance(axis, str) else axis)}
