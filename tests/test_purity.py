"""Every network is a pure function of its parameters: the same numbers under every transformation of JAX."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.convert.diffusers_folder import CONFIG
from tests.small_networks import random_network
from unclip_jax.checkpoints.networks import NETWORKS
from unclip_jax.distributed.mesh import local_mesh
from unclip_jax.models.configs import PriorConfig

BATCH = 4  # as many as there are devices
TOLERANCE = 1e-5  # relative; measured: 1e-6

# One level each: what is compared is the transformations, and compiling is what takes the time.
UNET = dataclasses.replace(
    CONFIG.unet, block_out_channels=(16,), attention_levels=(True,), num_heads=(2,), only_cross_attention=(False,)
)
UPSCALER = dataclasses.replace(
    UNET, in_channels=7, class_embedding="table", class_embedding_size=10, only_cross_attention=(True,)
)
VAE = dataclasses.replace(CONFIG.vae, block_out_channels=(16,))


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


CASES = {
    "unet": (
        NETWORKS["unet"],
        UNET,
        lambda model, x, context, label: model(x, jnp.full(len(x), 501), context, label),
        (normal(BATCH, 8, 8, 4), normal(BATCH, 77, 16), normal(BATCH, 16)),
    ),
    "upscaler": (
        NETWORKS["unet"],
        UPSCALER,
        lambda model, x, context: model(x, jnp.full(len(x), 501), context, jnp.full(len(x), 3)),
        (normal(BATCH, 8, 8, 7), normal(BATCH, 77, 16)),
    ),
    "vae encoder": (
        NETWORKS["vae"],
        VAE,
        lambda model, x: model.encode(x).mean,
        (normal(BATCH, 8, 8, 3),),
    ),
    "vae decoder": (NETWORKS["vae"], VAE, lambda model, z: model.decode(z), (normal(BATCH, 8, 8, 4),)),
    "text encoder": (
        NETWORKS["text_encoder"],
        CONFIG.text_encoder,
        # Gradients are with respect to a scale, since tokens are integers.
        lambda model, scale: scale[:, None, None] * model(jnp.tile(jnp.arange(77), (len(scale), 1))),
        (normal(BATCH),),
    ),
    "image encoder": (
        NETWORKS["image_encoder"],
        CONFIG.image_encoder,
        lambda model, x: model(x),
        (normal(BATCH, 56, 56, 3),),
    ),
    "prior": (
        NETWORKS["prior"],
        PriorConfig(embedding_dim=16, context_length=7, width=16, layers=2, heads=2),
        lambda model, x, states, embeds: model(x, jnp.full(len(x), 501), states, embeds, jnp.ones((len(x), 7), bool)),
        (normal(BATCH, 16), normal(BATCH, 7, 16), normal(BATCH, 16)),
    ),
}


def output_and_gradient(network, call, params, weights, *x):
    """What the network makes of a batch, and of each image's output the gradient with respect to its first input."""
    out, pull_back = jax.vjp(lambda first: call(network.merge(params), first, *x[1:]), x[0])
    return out, pull_back(weights)[0]


def transformed(function, inputs):
    """`function` of parameters and whole batches under each transformation, as functions of the same."""
    batches = (0,) * inputs
    specs = {"in_specs": (P(), *(P("data"),) * inputs), "out_specs": P("data")}
    pmapped = jax.pmap(function, in_axes=(None, *batches))

    def one(params, *x):
        return jax.tree.map(lambda a: a[0], function(params, *(a[None] for a in x)))

    def on_devices(params, *x):
        out = pmapped(params, *(a.reshape(BATCH, 1, *a.shape[1:]) for a in x))
        return jax.tree.map(lambda a: a.reshape(BATCH, *a.shape[2:]), out)

    return {
        "vmap": jax.jit(jax.vmap(one, in_axes=(None, *batches))),
        "pmap": on_devices,
        "shard_map": jax.jit(jax.shard_map(function, mesh=local_mesh(), **specs)),
    }


@pytest.mark.e2e
@pytest.mark.parametrize("name", CASES)
def test_networks_and_their_gradients_under_transformations(name):
    cls, config, call, inputs = CASES[name]
    network = random_network(cls, config)
    function = functools.partial(output_and_gradient, network, call)
    shape = jax.eval_shape(lambda params: call(network.merge(params), *inputs), network.params).shape
    arguments = (network.params, normal(*shape), *inputs)
    want = jax.jit(function)(*arguments)
    assert all(np.isfinite(array).all() and np.abs(array).max() > 0 for array in want)
    for way, run in transformed(function, 1 + len(inputs)).items():
        for kind, a, b in zip(("output", "gradient"), run(*arguments), want, strict=True):
            assert a.shape == b.shape, (way, kind)
            assert np.linalg.norm(np.asarray(a) - b) <= TOLERANCE * np.linalg.norm(b), (way, kind)
