"""Resizing of floats against `torch.nn.functional.interpolate`, in every mode, up and down."""

import numpy as np
import pytest
import torch

from unclip_jax.conditioning.resample import resample

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("method", ["nearest", "nearest-exact", "bilinear", "bicubic", "area"])
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("height", "width"), [(23, 31), (7, 9), (40, 60), (11, 62), (1, 1)])
def test_every_mode(method, antialias, height, width):
    image = np.random.default_rng(0).uniform(-1, 1, (23, 31, 3)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(image).permute(2, 0, 1)[None],
        (height, width),
        mode=method,
        antialias=antialias and method in ("bilinear", "bicubic"),
    )
    ours = resample(image, height, width, method, antialias=antialias)
    np.testing.assert_allclose(ours, theirs[0].permute(1, 2, 0).numpy(), atol=1e-5)  # measured 4e-6
