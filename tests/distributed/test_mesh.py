"""Where arrays go."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests.convert.diffusers_folder import CONFIG
from unclip_jax.checkpoints.networks import abstract_params
from unclip_jax.distributed.mesh import (
    PARTITION_RULES,
    batch_sharding,
    check_mesh,
    data_size,
    local_mesh,
    pad_batch,
    parameter_sharding,
)


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


def test_meshes_of_other_processes_are_refused(monkeypatch):
    """As seen from the second of two processes: none of the devices is its own."""
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(ValueError, match=r"mesh has devices of processes \[0\], and this is 1; want"):
        check_mesh(jax.make_mesh((4,), ("data",)))


def test_weights_are_split_where_the_rules_say_and_sizes_allow():
    mesh = check_mesh(jax.make_mesh((2, 2), ("data", "model")))
    params = abstract_params(CONFIG)
    split = {
        name: parameter_sharding(mesh, name, spec.shape).spec
        for name, spec in params.items()
        if parameter_sharding(mesh, name, spec.shape).spec != P()
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


def test_without_a_model_axis_weights_are_everywhere():
    sharding = parameter_sharding(local_mesh(), "unet.x.to_q.kernel", (8, 8))
    assert sharding.is_fully_replicated


def test_padding_repeats_the_last_row():
    rows = np.arange(10).reshape(5, 2)
    np.testing.assert_array_equal(pad_batch(rows, 8)[5:], np.repeat(rows[-1:], 3, axis=0))
    np.testing.assert_array_equal(pad_batch(rows, 5), rows)
