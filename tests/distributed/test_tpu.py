"""The full-size networks for TPUs, as far as a machine without one can say: their programs are made."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from convert.architecture.presets import PRESETS
from unclip_jax.checkpoints.networks import abstract_networks
from unclip_jax.distributed.mesh import batch_sharding, parameter_sharding
from unclip_jax.models import platform

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


def lower(config, mesh, part, function, shapes, gradient=False):
    """The text of a network's program for TPUs, with bfloat16 weights placed on the mesh as a pipeline places them."""
    network = abstract_networks(config)[part]
    params = {
        name: jax.ShapeDtypeStruct(
            spec.shape, jnp.bfloat16, sharding=parameter_sharding(mesh, f"{part}.{name}", spec.shape)
        )
        for name, spec in network.params.items()
    }

    def run(params, *arrays):
        return function(network.merge(params), *arrays)

    def loss(params, *arrays):
        return run(params, *arrays).mean()

    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=batch_sharding(mesh)) for shape in shapes]
    traced = jax.jit(jax.grad(loss) if gradient else run).trace(params, *arrays)
    return traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.fixture
def mesh(monkeypatch):
    """mesh(data, model): of that many devices along each axis."""
    monkeypatch.setattr(platform, "accelerator", lambda: "tpu")

    def made(data, model):
        devices = np.array(jax.local_devices()[: data * model]).reshape(data, model)
        return Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    return made


@pytest.mark.parametrize("gradient", [False, True], ids=["value", "gradient"])
def test_one_level_is_lowered_over_four_devices(mesh, gradient):
    """The attention of its down block, of the middle and of its two up blocks."""
    calls = lower(ONE_LEVEL, mesh(2, 2), *UNET, gradient).count("@CustomSPMDPartitioning")
    assert calls == (2 if gradient else 1) * 4


def test_one_level_uses_the_kernel(mesh):
    assert lower(ONE_LEVEL, mesh(1, 1), *UNET).count("tpu_custom_call") == 1


@pytest.mark.e2e
@pytest.mark.parametrize(("network", "shapes"), [(UNET, 2), (DECODER, 1)], ids=["unet", "decoder"])
def test_on_one_device_the_kernel_is_used(mesh, network, shapes):
    """At 768x768, tokens of the UNet's first two levels and of the decoder's middle fill the kernel's blocks."""
    assert lower(CONFIG, mesh(1, 1), *network).count("tpu_custom_call") == shapes


@pytest.mark.e2e
@pytest.mark.parametrize("gradient", [False, True], ids=["value", "gradient"])
@pytest.mark.parametrize(("network", "attentions"), [(UNET, 10), (DECODER, 1)], ids=["unet", "decoder"])
def test_over_four_devices_every_such_attention_is_partitioned(mesh, network, attentions, gradient):
    calls = lower(CONFIG, mesh(2, 2), *network, gradient).count("@CustomSPMDPartitioning")
    assert calls == (2 if gradient else 1) * attentions
