"""Where arrays go."""

import collections
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from convert.architecture.presets import PRESETS
from tests.convert.diffusers_folder import CONFIG
from unclip_jax.checkpoints.networks import abstract_network, abstract_params, head_width
from unclip_jax.distributed.mesh import (
    PARTITION_RULES,
    batch_sharding,
    check_mesh,
    data_size,
    local_mesh,
    pad_batch,
    parameter_sharding,
)
from unclip_jax.models.configs import UNetConfig
from unclip_jax.models.unet import UNet


def test_all_local_devices_along_data():
    mesh = local_mesh()
    assert mesh.axis_names == ("data",)
    assert data_size(mesh) == jax.local_device_count() == 4
    assert batch_sharding(mesh).spec == P("data")
    assert data_size(local_mesh(jax.local_devices()[:3])) == 3


def test_meshes_of_other_axes_are_refused():
    with pytest.raises(ValueError, match="tensor"):
        check_mesh(jax.make_mesh((4,), ("tensor",)))
    mesh = check_mesh(jax.make_mesh((2, 2), ("data", "model")))
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_meshes_without_this_process_or_another_are_refused(monkeypatch):
    """As seen from the second of two processes: all devices are the first one's."""
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"mesh has devices of processes \[0\] of 2, and this is 1; want"):
        check_mesh(jax.make_mesh((4,), ("data",)))


def test_weights_are_split_where_the_rules_say_and_sizes_allow():
    mesh = check_mesh(jax.make_mesh((2, 2), ("data", "model")))
    params = abstract_params(CONFIG)
    split = {
        name: parameter_sharding(mesh, name, spec.shape, head_width(CONFIG, name.split(".")[0])).spec
        for name, spec in params.items()
        if parameter_sharding(mesh, name, spec.shape, head_width(CONFIG, name.split(".")[0])).spec != P()
    }
    assert split["unet.mid_block.attentions.0.attn1.to_q.kernel"] == P(None, "model")
    assert split["unet.mid_block.attentions.0.attn1.to_out.kernel"] == P("model", None)
    assert split["text_encoder.layers.fc1.kernel"] == P(None, None, "model")
    assert split["unet.mid_block.resnets.0.conv2.kernel"] == P(None, None, "model", None)
    assert "unet.conv_in.kernel" not in split
    # Most of the numbers are in kernels that the rules split.

    def size(names):
        return sum(int(np.prod(params[name].shape)) for name in names)

    unet = [name for name in params if name.startswith("unet.")]
    assert size(name for name in unet if name in split) > 0.5 * size(unet)
    # Nothing is split unevenly, and nothing along "data".
    odd = parameter_sharding(mesh, "unet.x.to_q.kernel", (8, 7))
    assert odd.spec == P()
    assert PARTITION_RULES[-1] == (r".*", ())


@pytest.mark.parametrize(("width", "spec"), [(320, P()), (640, P(None, "model"))])
def test_attention_is_split_between_heads(width, spec):
    """Of 64: five of them are not for two devices, ten are."""
    mesh = check_mesh(jax.make_mesh((2, 2), ("data", "model")))
    sharding = parameter_sharding(mesh, "unet.x.to_q.kernel", (320, width), 64)
    assert sharding.spec == spec
    assert parameter_sharding(mesh, "unet.x.ff.proj_out.kernel", (width, 320), 64).spec == P("model", None)


def test_head_widths_are_the_configurations():
    sd = PRESETS["sd21-unclip-h"]
    widths = {name: head_width(sd, name) for name in ("unet", "vae", "text_encoder", "image_encoder")}
    assert widths == {"unet": 64, "vae": 512, "text_encoder": 64, "image_encoder": 80}
    upscaler = UNetConfig(block_out_channels=(256, 512, 512, 1024), num_heads=(8, 8, 8, 8))
    assert upscaler.head_width == 128


@pytest.mark.parametrize(("heads", "branches"), [(4, 5 + 3 * 4), (5, 5 + 4)])
def test_a_level_gathers_nothing_and_reduces_once_a_branch(heads, branches):
    """Of five resnets and four transformers of three branches; where two devices do not divide the heads, of one."""
    config = UNetConfig(
        block_out_channels=(32 * heads,),
        layers_per_block=1,
        attention_levels=(True,),
        num_heads=(heads,),
        only_cross_attention=(False,),
        cross_attention_dim=16,
        norm_groups=16,
    )
    mesh = check_mesh(jax.make_mesh((2, 2), ("data", "model")))
    network = abstract_network(UNet, config)
    params = {
        name: jax.ShapeDtypeStruct(
            spec.shape, spec.dtype, sharding=parameter_sharding(mesh, f"unet.{name}", spec.shape, config.head_width)
        )
        for name, spec in network.params.items()
    }
    shapes = ((4, 32, 32, 4), (4,), (4, 77, 16))
    arrays = [jax.ShapeDtypeStruct(shape, np.float32, sharding=batch_sharding(mesh)) for shape in shapes]
    compiled = jax.jit(lambda params, *a: network.merge(params)(*a)).lower(params, *arrays).compile().as_text()
    operations = collections.Counter(re.findall(r" = \S+ (all-\w+|reduce-scatter)\(", compiled))
    assert operations == {"all-reduce": branches + 1}  # and the time embedding's


def test_without_a_model_axis_weights_are_everywhere():
    sharding = parameter_sharding(local_mesh(), "unet.x.to_q.kernel", (8, 8))
    assert sharding.is_fully_replicated


def test_padding_repeats_the_last_row():
    rows = np.arange(10).reshape(5, 2)
    np.testing.assert_array_equal(pad_batch(rows, 8)[5:], np.repeat(rows[-1:], 3, axis=0))
    np.testing.assert_array_equal(pad_batch(rows, 5), rows)
