"""Where the devices hold a network's parameters, and how its layers read those that are split to save memory."""

from collections.abc import Mapping

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from unclip_jax.checkpoints.config import AnyConfig
from unclip_jax.checkpoints.networks import Network, head_width, is_stacked
from unclip_jax.distributed.mesh import fully_sharded, parameter_sharding


def parameter_shardings(mesh: Mesh, config: AnyConfig, part: str, network: Network) -> dict[str, NamedSharding]:
    """The sharding of each parameter of an abstract network: its shape's own, or that of `parameter_sharding`.

    Args:
        mesh: The devices.
        config: The checkpoint's configuration.
        part: The network's name there.
        network: The network, from `abstract_networks` or `shard_weights`.
    """
    width = head_width(config, part)
    return {
        name: spec.sharding or parameter_sharding(mesh, f"{part}.{name}", spec.shape, width)
        for name, spec in network.params.items()
    }


def shard_weights(networks: Mapping[str, Network], config: AnyConfig, mesh: Mesh) -> dict[str, Network]:
    """Abstract networks whose weights are split over all devices, and gathered by each layer while it runs.

    Vectors, biases and the weights of norms, are less than a thousandth of all: they are not split.

    Args:
        networks: name -> abstract network.
        config: The checkpoint's configuration.
        mesh: The devices.

    Returns:
        name -> network. Its shapes have the shardings in which parameters are held, its structure those in which
        layers read them, see `unclip_jax.models.partition.read_weight`.
    """
    return {part: _shard(network, part, config, mesh) for part, network in networks.items()}


def _shard(network: Network, part: str, config: AnyConfig, mesh: Mesh) -> Network:
    from flax import nnx  # here, since most pipelines need it only where they trace, and some never do

    whole = parameter_shardings(mesh, config, part, network)
    model, params = network.merge(), dict(network.params)
    for path, weight in nnx.to_flat_state(nnx.state(model)):
        name = ".".join(map(str, path))
        stacked = int(is_stacked(f"{part}.{name}"))
        if len(weight.shape) - stacked < 2:
            continue
        spec = whole[name].spec
        # Not by layers, of which one is read at a time, nor by words, to which textual inversion adds.
        first = int(stacked or name.endswith("embedding"))
        held = fully_sharded(mesh, weight.shape, spec, first)
        params[name] = jax.ShapeDtypeStruct(weight.shape, params[name].dtype, sharding=held)
        weight.set_metadata(whole=NamedSharding(mesh, PartitionSpec(*spec[stacked:])))
    return Network(nnx.split(model)[0], params)
