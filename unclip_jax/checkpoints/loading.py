"""Loading a checkpoint's networks onto their devices."""

import contextlib
import ctypes
import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from unclip_jax.checkpoints.checkpoint import Checkpoint
from unclip_jax.checkpoints.networks import Network, fill
from unclip_jax.checkpoints.placement import parameter_shardings
from unclip_jax.distributed.mesh import placed
from unclip_jax.progress import Progress

LARGE = 1 << 26


def load_networks(
    checkpoint: Checkpoint, networks: Mapping[str, Network], mesh: Mesh, progress: bool = True
) -> dict[str, Network]:
    """Reads networks of an open checkpoint parameter by parameter, straight onto their devices.

    Args:
        checkpoint: The open checkpoint.
        networks: name -> abstract network (`unclip_jax.checkpoints.networks.abstract_networks`), which decides the
            dtype.
        mesh: The devices, see `unclip_jax.distributed.mesh`.
        progress: Show a progress bar.

    Returns:
        name -> network with parameters.

    Raises:
        ValueError: A file turns out to be broken.
    """
    sizes = (checkpoint.params[f"{part}.{name}"] for part, network in networks.items() for name in network.params)
    total = sum(math.prod(parameter.shape) * parameter.dtype.itemsize for parameter in sizes)
    filled = {}
    with Progress("loading weights", total, unit="B", enabled=progress, bytes_=True) as bar:
        for component, abstract in networks.items():
            shardings = parameter_shardings(mesh, checkpoint.config, component, abstract)

            def read(name: str, component: str = component) -> np.ndarray:
                parameter = checkpoint.params[f"{component}.{name}"].read()
                bar.update(parameter.nbytes)
                return parameter

            def place(name: str, array: np.ndarray, shardings: Mapping[str, NamedSharding] = shardings) -> jax.Array:
                on_devices = placed(array, shardings[name])
                # The transfer goes on in the background and keeps what was read: not with several of a gigabyte.
                return on_devices.block_until_ready() if array.nbytes > LARGE else on_devices

            filled[component] = fill(abstract, read, place)
    return_freed_memory()
    return filled


def return_freed_memory() -> None:
    """Returns freed memory to the system, where the C library offers that: glibc keeps much of it.

    Parameters, and the buffers that they are read into, have sizes that glibc allocates from its own heap. After a
    full-size UNet was released, a gigabyte of it stayed with the process.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
