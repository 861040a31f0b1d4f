"""What decides about a device's kernels, and about the dtype of a pipeline on it."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.models.platform import platform_of
from unclip_jax.pipelines.opening import check_dtype

CUDA = SimpleNamespace(platform_version="PJRT C API\ncuda 12090")
ROCM = SimpleNamespace(platform_version="PJRT C API\nrocm 60443")
DEVICES = [
    (SimpleNamespace(platform="cpu"), "cpu", jnp.float32),
    (SimpleNamespace(platform="gpu", client=CUDA, compute_capability="9.0"), "gpu", jnp.bfloat16),  # H200
    (SimpleNamespace(platform="gpu", client=CUDA, compute_capability="12.0"), "gpu", jnp.bfloat16),
    (SimpleNamespace(platform="gpu", client=CUDA, compute_capability="7.5"), "old-gpu", jnp.float16),  # T4
    (SimpleNamespace(platform="gpu", client=ROCM, compute_capability="gfx942"), "rocm", jnp.bfloat16),
    (SimpleNamespace(platform="tpu", device_kind="TPU v5 lite"), "tpu", jnp.bfloat16),
    (SimpleNamespace(platform="tpu", device_kind="TPU v3"), "old-tpu", jnp.bfloat16),
    (SimpleNamespace(platform="METAL"), "METAL", jnp.bfloat16),
]


@pytest.mark.parametrize(("device", "name", "dtype"), DEVICES, ids=[name for _, name, _ in DEVICES])
def test_devices_have_their_kernels_and_their_default_dtype(device, name, dtype):
    assert platform_of(device) == name
    mesh = SimpleNamespace(devices=np.array([device], object))
    assert check_dtype(None, mesh) == dtype
    assert check_dtype("float16", mesh) == jnp.float16
