"""A checkpoint's networks on their devices."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from unclip_jax.checkpoints.checkpoint import Checkpoint
from unclip_jax.checkpoints.networks import Network, abstract_networks, fill
from unclip_jax.distributed.mesh import parameter_sharding
from unclip_jax.progress import Progress


def load_networks(checkpoint: Checkpoint, dtype: Any, mesh: Mesh) -> dict[str, Network]:
    """Reads the networks of an open checkpoint parameter by parameter, straight onto their devices.

    dtype: of weights and computation. mesh: where they go, see `unclip_jax.distributed.mesh`. Keys as in
    `unclip_jax.checkpoints.networks.NETWORKS`. Raises ValueError for a file that turns out broken.
    """
    networks = {}
    with Progress("loading weights", checkpoint.nbytes, unit="B", bytes_=True) as bar:
        for component, abstract in abstract_networks(checkpoint.config, dtype).items():

            def read(name: str, component: str = component) -> np.ndarray:
                parameter = checkpoint.params[f"{component}.{name}"].read()
                bar.update(parameter.nbytes)
                return parameter

            def place(name: str, array: np.ndarray, component: str = component) -> jax.Array:
                return jax.device_put(array, parameter_sharding(mesh, f"{component}.{name}", array.shape))

            networks[component] = fill(abstract, read, place)
    return networks
