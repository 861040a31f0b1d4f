"""A checkpoint's networks on their devices."""

import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from unclip_jax.checkpoints.checkpoint import Checkpoint
from unclip_jax.checkpoints.networks import Network, fill
from unclip_jax.distributed.mesh import parameter_sharding
from unclip_jax.progress import Progress


def load_networks(
    checkpoint: Checkpoint, networks: Mapping[str, Network], mesh: Mesh, progress: bool = True
) -> dict[str, Network]:
    """Reads networks of an open checkpoint parameter by parameter, straight onto their devices.

    networks: name -> abstract network (`unclip_jax.checkpoints.networks.abstract_networks`), which says the dtype.
    mesh: where they go, see `unclip_jax.distributed.mesh`. Raises ValueError for a file that turns out broken.
    """
    sizes = (checkpoint.params[f"{part}.{name}"] for part, network in networks.items() for name in network.params)
    total = sum(math.prod(parameter.shape) * parameter.dtype.itemsize for parameter in sizes)
    filled = {}
    with Progress("loading weights", total, unit="B", enabled=progress, bytes_=True) as bar:
        for component, abstract in networks.items():

            def read(name: str, component: str = component) -> np.ndarray:
                parameter = checkpoint.params[f"{component}.{name}"].read()
                bar.update(parameter.nbytes)
                return parameter

            def place(name: str, array: np.ndarray, component: str = component) -> jax.Array:
                return jax.device_put(array, parameter_sharding(mesh, f"{component}.{name}", array.shape))

            filled[component] = fill(abstract, read, place)
    return filled
