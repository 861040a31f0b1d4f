"""Convolution kernels in Winograd's domain: what compiled programs on a CPU read in the place of a network's own.

A network's parameters stay what they are, for users, adapters, export and training. The kernels here are made of them
at the first use, and made again when an adapter puts others in their place.
"""

import dataclasses
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unclip_jax.checkpoints.networks import Network
from unclip_jax.distributed.mesh import placed
from unclip_jax.host_memory import available_memory
from unclip_jax.models.winograd import tile_of, transform_kernel, transformed_shape
from unclip_jax.pipelines.memory import Memory
from unclip_jax.progress import Progress

NETWORKS = ("unet", "vae")
# The convolutions between the levels of a way down have stride 2.
_STRIDED = re.compile(r"(encoder\.)?down_blocks\.\d+\.resample\.kernel")
# Bytes that must stay free for the activations of a run.
_RESERVE = 2**31


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The kernels that were made. made: "network.parameter" -> the network's own kernel, and the transformed one."""

    made: dict[str, tuple[jax.Array, jax.Array]] = dataclasses.field(default_factory=dict)

    def weights(self, network: str, params: Mapping[str, jax.Array], progress: bool = True) -> Mapping[str, jax.Array]:
        """The parameters of a network with transformed kernels in the place of its own, where there are such."""
        if network not in NETWORKS:
            return params
        tiles = kernel_tiles(params)
        new = [name for name in tiles if self._own(network, name) is not params[name]]
        for name in new:
            self.made.pop(f"{network}.{name}", None)

        def make(name: str) -> jax.Array:
            kernel = params[name]
            return placed(transform_kernel(np.asarray(kernel), tiles[name]), kernel.sharding)

        label = f"preparing kernels of the {network}"
        with (
            Progress(label, len(new), unit="kernel", enabled=progress) as bar,
            ThreadPoolExecutor() as pool,
        ):
            for name, transformed in zip(new, pool.map(make, new), strict=True):
                self.made[f"{network}.{name}"] = params[name], transformed
                bar.update()
        return {**params, **{name: self.made[f"{network}.{name}"][1] for name in tiles}}

    def _own(self, network: str, name: str) -> jax.Array | None:
        return self.made.get(f"{network}.{name}", (None, None))[0]


def make_kernels(networks: Mapping[str, Network], mesh: Mesh, dtype: Any, memory: Memory) -> Kernels | None:
    """`Kernels` for a pipeline, or None for convolutions by the networks' own.

    Args:
        networks: The pipeline's, on their devices.
        mesh, dtype, memory: Of the pipeline.

    Raises:
        ValueError: `memory` asks for what these devices or this dtype do not have.
    """
    if not may_transform(mesh, dtype, memory):
        if memory.convolution == "winograd":
            raise ValueError('convolution is "winograd"; that needs float32 on CPUs without a "model" axis')
        return None
    if mesh.is_multi_process and memory.convolution is None:
        return None  # hosts with other memory would choose otherwise
    free = available_memory()
    specs = [spec for part in transformed_specs(networks).values() for spec in part.values()]
    more = sum(spec.size * spec.dtype.itemsize for spec in specs) * len(mesh.local_devices)
    return Kernels() if memory.convolution == "winograd" or free is None or more + _RESERVE <= free else None


def may_transform(mesh: Mesh, dtype: Any, memory: Memory) -> bool:
    """Whether transformed kernels are wanted and serve here; on other devices and in half precision nobody measured."""
    if memory.convolution == "direct" or memory.free_networks or memory.shard_weights:
        return False
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return on_cpu and jnp.dtype(dtype) == jnp.float32 and mesh.shape.get("model", 1) == 1


def kernel_tiles(params: Mapping[str, Any]) -> dict[str, int]:
    """The kernels of a UNet or a VAE that are to be transformed: name -> the side of a tile."""
    shapes = {name: array.shape for name, array in params.items() if not _STRIDED.fullmatch(name)}
    tiles = {name: tile_of(shape) for name, shape in shapes.items()}
    return {name: tile for name, tile in tiles.items() if tile is not None}


def transformed_specs(networks: Mapping[str, Network]) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """The transformed kernels of networks as shapes: network -> name -> shape and dtype."""
    return {
        part: {
            name: jax.ShapeDtypeStruct(transformed_shape(network.params[name].shape, tile), jnp.float32)
            for name, tile in kernel_tiles(network.params).items()
        }
        for part, network in networks.items()
        if part in NETWORKS
    }
