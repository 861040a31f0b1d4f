"""Weights are read once for all devices; split over them, each layer gathers its own while it runs."""

import collections
import dataclasses
import math
import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from unclip_jax.checkpoints.checkpoint import Parameter
from unclip_jax.checkpoints.loading import load_networks
from unclip_jax.checkpoints.networks import abstract_network, abstract_networks
from unclip_jax.checkpoints.placement import parameter_shardings, shard_weights
from unclip_jax.checkpoints.source import open_checkpoint
from unclip_jax.compilation import compiler_options
from unclip_jax.distributed.mesh import batch_sharding, check_mesh, fully_sharded, local_mesh
from unclip_jax.models.layers import Linear


@pytest.fixture(scope="module")
def checkpoint(family_folder):
    with open_checkpoint(family_folder("SMALL")) as opened:
        yield opened


def counted(checkpoint, reads):
    """The same checkpoint, which notes every piece of a parameter that is read."""

    def noting(name, number, piece):
        def read():
            reads[name, number] += 1
            return piece()

        return read

    params = {
        name: Parameter(p.shape, p.dtype, tuple(noting(name, n, piece) for n, piece in enumerate(p.pieces)))
        for name, p in checkpoint.params.items()
    }
    return dataclasses.replace(checkpoint, params=params)


@pytest.mark.parametrize(("shape", "sharded"), [((4, 1), False), ((2, 2), False), ((4, 1), True), ((2, 2), True)])
def test_every_weight_is_read_once_for_all_devices(checkpoint, shape, sharded):
    mesh, reads = check_mesh(jax.make_mesh(shape, ("data", "model"))), collections.Counter()
    networks = abstract_networks(checkpoint.config)
    if sharded:
        networks = shard_weights(networks, checkpoint.config, mesh)
    loaded = load_networks(counted(checkpoint, reads), networks, mesh, progress=False)
    names = {f"{part}.{name}" for part, network in loaded.items() for name in network.params}
    assert {name for name, _ in reads} == names
    assert set(reads.values()) == {1}
    for part, network in loaded.items():
        for name, array in network.params.items():
            np.testing.assert_array_equal(array, checkpoint.params[f"{part}.{name}"].read())


def test_a_device_holds_its_share_of_every_weight(checkpoint):
    mesh, config = local_mesh(), checkpoint.config
    for part, network in shard_weights(abstract_networks(config), config, mesh).items():
        shardings = parameter_shardings(mesh, config, part, network)
        size = sum(spec.size for spec in network.params.values())
        held = sum(math.prod(shardings[name].shard_shape(spec.shape)) for name, spec in network.params.items())
        assert held < 0.3 * size  # of these small networks, biases and norms are some percent
        for name, spec in shardings.items():
            stacked = name.startswith("layers.")
            if stacked or name.endswith("embedding"):
                assert spec.spec[:1] in ((), (None,)), name
            if name.endswith("bias"):
                assert spec.is_fully_replicated


class Chain(nnx.Module):
    """Layers of one width, one after the other."""

    def __init__(self, layers, **kw):
        self.links = nnx.List([Linear(128, 128, use_bias=False, **kw) for _ in range(layers)])

    def __call__(self, x):
        for link in self.links:
            x = jax.numpy.tanh(link(x))
        return x


@pytest.mark.usefixtures("fully_compiled")
def test_one_layers_weights_are_whole_at_a_time(checkpoint):
    """In a loop: not gathered before it, and in it each when it is needed."""
    mesh, layers, weight = local_mesh(), 16, 4 * 128 * 128
    chain = {"chain": abstract_network(Chain, layers)}
    network = shard_weights(chain, checkpoint.config, mesh)["chain"]
    x = jax.ShapeDtypeStruct((4, 128), np.float32, sharding=batch_sharding(mesh))

    def run(params, x):
        return jax.lax.fori_loop(0, 3, lambda _, x: network.merge(params)(x), x)

    options = compiler_options(mesh, sharded=True)
    compiled = jax.jit(run, compiler_options=options).lower(network.params, x).compile()
    sizes = compiled.memory_analysis()
    assert sizes.argument_size_in_bytes < 1.1 * layers * weight / mesh.size
    assert weight < sizes.temp_size_in_bytes < 4 * weight
    loop, entry = compiled.as_text().split("\nENTRY ")
    assert "all-gather" not in entry
    assert len(re.findall(r" all-gather\(", loop)) == layers


def test_what_no_device_count_divides_stays_as_it_is():
    mesh = check_mesh(jax.make_mesh((2, 2), ("data", "model")))
    assert fully_sharded(mesh, (8, 12)).spec == P(None, ("data", "model"))
    assert fully_sharded(mesh, (3, 5)).spec == P()
    assert fully_sharded(mesh, (8, 12), first=1).spec == P(None, ("data", "model"))
    assert fully_sharded(mesh, (12, 6), first=1).spec == P()
    # What is split over "model" already is split further over "data", along the longer of what is left.
    assert fully_sharded(mesh, (4, 16), P(None, "model")).spec == P(None, ("model", "data"))
    assert fully_sharded(mesh, (12, 16), P(None, "model")).spec == P("data", "model")
