"""Training low-rank adapters (Hu et al. 2021, arXiv:2106.09685): W + scale A B in the place of W, with A and B trained.

An adapter maps the adapted parameters' names, with `.down` and `.up`, to arrays: down (in, rank) or (h, w, in, rank),
up (rank, out). It is separate from the network's own parameters. `merge_lora` is pure, so a training step only needs
the gradient of a loss of the merged weights with respect to the adapter. The base stays as it is, in whatever dtype.
alpha is not a separate number here, where everything is trained: `as_lora` converts to what the rest of the package
calls an adapter.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.adapters.changes import LowRank
from unclip_jax.adapters.lora import with_lora

# What diffusers and peft adapt by default: the projections of attention.
ATTENTION = r".*\.(to_q|to_k|to_v|to_out)\.kernel"
# What the first LoRA trainers for diffusion call "all": feed-forward, projections and convolutions, too.
EVERYTHING = r".*\.(to_q|to_k|to_v|to_out|proj_in|proj_out|conv1|conv2|conv_shortcut|resample|time_emb_proj)\.kernel"


def initial_lora(
    params: Mapping[str, Any], rank: int, seed: int, targets: str = ATTENTION, alpha: float | None = None
) -> dict[str, jax.Array]:
    """An adapter that changes nothing yet: `down` is random, `up` is zero.

    Args:
        params: A network's, name -> array or shape, kernels (in, out) or (h, w, in, out).
        rank: The adapter's rank.
        seed: Determines `down`.
        targets: A pattern of names.
        alpha: The scale is alpha / rank; it is multiplied into `down`, so that the adapter's scale is 1. None: rank.

    Returns:
        The adapter.

    Raises:
        ValueError: The rank is not positive, or no kernel fits the pattern.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; want at least 1")
    names = [name for name, value in params.items() if re.fullmatch(targets, name) and len(value.shape) in (2, 4)]
    if not names:
        raise ValueError(f"targets is {targets!r}; no kernel of this network has such a name")
    scale = 1.0 if alpha is None else alpha / rank
    adapter = {}
    for index, name in enumerate(sorted(names)):
        *inner, out = params[name].shape
        key = jax.random.fold_in(jax.random.key(seed), index)
        bound = scale / np.sqrt(np.prod(inner))  # the uniform distribution that peft begins with
        adapter[f"{name}.down"] = jax.random.uniform(key, (*inner, rank), minval=-bound, maxval=bound)
        adapter[f"{name}.up"] = jnp.zeros((rank, out))
    return adapter


def merge_lora(
    params: Mapping[str, jax.Array], adapter: Mapping[str, jax.Array], scale: jax.Array | float = 1.0
) -> dict[str, jax.Array]:
    """A network's parameters with an adapter at this scale, each in the dtype it had.

    Args:
        params: The network's parameters.
        adapter: The adapter.
        scale: Its scale.

    Returns:
        The merged parameters.

    Raises:
        ValueError: The adapter's parameter is missing or has another shape. The message names it.
    """
    return with_lora(params, [as_lora(adapter)], [scale])


def as_lora(adapter: Mapping[str, Any], network: str | None = None) -> dict[str, LowRank]:
    """The same with one value per parameter, alpha being the rank.

    Args:
        adapter: The adapter.
        network: The network's name, which then begins the parameters' names.

    Returns:
        parameter -> its change.
    """
    prefix = "" if network is None else f"{network}."
    changes = {}
    for name in adapted(adapter):
        down, up = adapter[f"{name}.down"], adapter[f"{name}.up"]
        changes[prefix + name] = LowRank(down, up, np.float32(down.shape[-1]))
    return changes


def adapted(adapter: Mapping[str, Any]) -> list[str]:
    """The names of the parameters that an adapter changes.

    Raises:
        ValueError: It has only half of a pair.
    """
    names = {name.removesuffix(end) for name in adapter for end in (".down", ".up") if name.endswith(end)}
    whole = {f"{name}{end}" for name in names for end in (".down", ".up")}
    if whole != set(adapter):
        raise ValueError(f"adapter: {min(whole ^ set(adapter))} is missing, or has no counterpart")
    return sorted(names)
