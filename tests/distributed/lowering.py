"""The full-size networks' programs for accelerators, as far as a machine without one can make them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from convert.architecture.presets import PRESETS
from unclip_jax.checkpoints.networks import abstract_networks, head_width
from unclip_jax.distributed.mesh import batch_sharding, parameter_sharding

CONFIG = PRESETS["sd21-unclip-h"]
# Its first level and the middle: the widths and the tokens of the kernels that are used, and little besides.
ONE_LEVEL = dataclasses.replace(
    CONFIG,
    unet=dataclasses.replace(
        CONFIG.unet,
        block_out_channels=CONFIG.unet.block_out_channels[:1],
        layers_per_block=1,
        attention_levels=(True,),
        num_heads=CONFIG.unet.num_heads[:1],
        only_cross_attention=(False,),
    ),
)


def unet(model, latents, timesteps, text, labels):
    return model(latents, timesteps, text, labels)


def decoder(model, latents):
    return model.decode(latents)


UNET = ("unet", unet, ((4, 96, 96, 4), (4,), (4, 77, 1024), (4, 2048)))
DECODER = ("vae", decoder, ((4, 96, 96, 4),))


def mesh(data, model):
    """Of that many devices along each axis."""
    devices = np.array(jax.local_devices()[: data * model]).reshape(data, model)
    return Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def lower(platform, config, mesh, part, function, shapes, gradient=False, dtype=jnp.bfloat16):
    """The text of a network's program for a platform, with weights placed on the mesh as a pipeline places them."""
    network = abstract_networks(config, dtype)[part]
    width = head_width(config, part)
    params = {
        name: jax.ShapeDtypeStruct(
            spec.shape, dtype, sharding=parameter_sharding(mesh, f"{part}.{name}", spec.shape, width)
        )
        for name, spec in network.params.items()
    }

    def run(params, *arrays):
        return function(network.merge(params), *arrays)

    def loss(params, *arrays):
        return run(params, *arrays).mean()

    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=batch_sharding(mesh)) for shape in shapes]
    traced = jax.jit(jax.grad(loss) if gradient else run).trace(params, *arrays)
    return traced.lower(lowering_platforms=(platform,)).as_text()
