"""Adapters as pure functions of a network's parameters; LoRA's are the most common.

W + scale delta(W) takes the place of W, see `unclip_jax.adapters.changes`. Each of several adapters changes the W from
before all of them, so their order does not matter. The parameters that an adapter is added to are never modified: to
remove it, use them again. Its scale is an ordinary number. Outside `jit`, `with_lora` merges; inside a compiled program
it applies the adapter on the fly, and another scale does not recompile.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from unclip_jax.adapters.changes import Change, LowRank, fits
from unclip_jax.checkpoints.networks import Network, part

# By our parameter's name, with its network's before it where an adapter is of several: "unet.conv_in.kernel". Where a
# parameter stacks a tower's layers, an adapter is of one: "text_encoder.layers.3.q_proj.kernel" is of the fourth
# layer of "text_encoder.layers.q_proj.kernel".
Lora = Mapping[str, Change]
Term = tuple[Change, Any]  # and its scale


def with_lora(params: Mapping[str, Any], loras: Sequence[Lora], scales: Sequence[jax.Array | float]) -> dict[str, Any]:
    """A network's parameters with adapters at these scales, each in the dtype it had; sums are float32.

    Args:
        params: name -> array.
        loras: Any number of adapters, with the same names.
        scales: () each, one per adapter, traced like everything else.

    Returns:
        name -> array; parameters without an adapter are the given ones.

    Raises:
        ValueError: An adapter's parameter is missing or has another shape (the message names it), or there is not one
            scale per adapter.
    """
    if len(loras) != len(scales):
        raise ValueError(f"scales has {len(scales)} entries for {len(loras)} adapters; want one per adapter")
    changes: dict[str, dict[int | None, list[Term]]] = defaultdict(lambda: defaultdict(list))
    for lora, scale in zip(loras, scales, strict=True):
        for name, change in lora.items():
            target, layer = _target(name)
            _check(name, change, params.get(target), layer)
            changes[target][layer].append((change, scale))
    changed = {}
    for name, layers in changes.items():
        table = [layers[None]] if None in layers else [layers.get(i, []) for i in range(params[name].shape[0])]
        changed[name] = _add_stacked(params[name], table) if None not in layers else _add(params[name], table[0])
    return {**params, **changed}


def merge_loras(networks: Mapping[str, Network], loras: Sequence[Lora], weights: Sequence[float]) -> dict[str, Network]:
    """The networks of a pipeline with adapters merged in; unchanged networks are the same objects.

    Keep the given networks: to undo the merge, use them again. Every parameter stays on its devices, sharded as it was.

    Args:
        networks: By name, as in the adapters' names.
        loras: The adapters.
        weights: One per adapter, any finite number; 0 leaves it out.

    Returns:
        name -> network.

    Raises:
        ValueError: As in `with_lora`; or an adapter's network is missing, or a weight is not finite.
    """
    if len(loras) != len(weights):
        raise ValueError(f"weights has {len(weights)} entries for {len(loras)} adapters; want one per adapter")
    for weight in weights:
        if not math.isfinite(weight):
            raise ValueError(f"adapter weight is {weight}; want a finite number")
    used = [(lora, weight) for lora, weight in zip(loras, weights, strict=True) if weight]
    merged = dict(networks)
    for component in dict.fromkeys(name.split(".")[0] for lora, _ in used for name in lora):
        if component not in networks:
            raise ValueError(f"adapter of {component}: want one of {', '.join(networks)}")
        network = networks[component]
        whole = with_lora(network.params, [part(lora, component) for lora, _ in used], [weight for _, weight in used])
        for name, value in whole.items():
            base = network.params[name]
            if value is not base and isinstance(base, jax.Array):
                whole[name] = jax.device_put(value, base.sharding)
        merged[component] = Network(network.graphdef, whole)
    return merged


def _target(name: str) -> tuple[str, int | None]:
    """The parameter that a name of an adapter means, and which of its stacked layers."""
    match = re.fullmatch(r"((?:.*\.)?layers)\.(\d+)(\..*)", name)
    return (match[1] + match[3], int(match[2])) if match else (name, None)


def _check(name: str, change: Change, param: Any, layer: int | None) -> None:
    want = None if param is None else param.shape if layer is None else param.shape[1:]
    if want is None or not fits(change, tuple(want)) or (layer is not None and layer >= param.shape[0]):
        have = "no such parameter" if want is None else f"shape {param.shape}"
        raise ValueError(f"adapter of {name}, {change.shape}: this network has {have}")
    if isinstance(change, LowRank) and (change.up.ndim != 2 or change.up.shape[0] != change.rank):
        raise ValueError(f"adapter of {name}: down {change.down.shape} and up {change.up.shape} differ in rank")


@jax.jit
def _add(base: jax.Array, terms: list[Term]) -> jax.Array:
    """The sum in float32, rounded once to the base's dtype."""
    deltas = [change.delta(base) * jnp.asarray(scale, jnp.float32) for change, scale in terms]
    return sum(deltas, jnp.asarray(base, jnp.float32)).astype(base.dtype)


@jax.jit
def _add_stacked(base: jax.Array, layers: list[list[Term]]) -> jax.Array:
    """Layers may be of different changes, or of none."""
    return jnp.stack([_add(layer, terms) if terms else layer for layer, terms in zip(base, layers, strict=True)])
