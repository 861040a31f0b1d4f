"""Ensembles of estimates against diffusers', with its cost in float64 as ours is."""

from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import MarigoldNormalsPipeline
from diffusers.pipelines.marigold import pipeline_marigold_depth

from tests.estimation.double import Double
from unclip_jax.estimation import ensemble_depth, ensemble_normals

pytestmark = pytest.mark.parity


def maps(count, clipped, seed=0):
    rng = np.random.default_rng(seed)
    scene = rng.random((1, 31, 40, 1))
    made = scene * rng.uniform(0.5, 1.2, (count, 1, 1, 1)) + rng.uniform(-0.2, 0.2, (count, 1, 1, 1))
    made += 0.05 * rng.standard_normal((count, 31, 40, 1))
    return (np.clip(made, 0, 1) if clipped else (made - made.min()) / np.ptp(made)).astype(np.float32)


@pytest.mark.parametrize("count", [2, 3, 4, 7])
@pytest.mark.parametrize("clipped", [False, True], ids=["", "clipped"])
@pytest.mark.parametrize("shift", [True, False], ids=["affine", "scale"])
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "mean"}, {"max_res": 20}, {"regularizer_strength": 0.0}], ids=str
)
def test_depth(count, clipped, shift, options):
    """Measured: 7e-7, and 2e-5 (its deviation 2e-4) where two clipped maps have a kink of the cost at the start."""
    given = maps(count, clipped)
    with mock.patch.object(pipeline_marigold_depth, "torch", Double()):
        theirs, spread = pipeline_marigold_depth.MarigoldDepthPipeline.ensemble_depth(
            torch.from_numpy(given).permute(0, 3, 1, 2), True, shift, output_uncertainty=True, **options
        )
    ours, uncertainty = ensemble_depth(given, shift_invariant=shift, **options)
    np.testing.assert_allclose(ours[..., 0], theirs[0, 0].numpy(), atol=1e-4)
    np.testing.assert_allclose(uncertainty[..., 0], spread[0, 0].numpy(), atol=1e-3)


@pytest.mark.parametrize("reduction", ["closest", "mean"])
def test_normals(reduction):
    given = np.random.default_rng(0).standard_normal((4, 9, 11, 3)).astype(np.float32)
    given /= np.linalg.norm(given, axis=-1, keepdims=True)
    theirs, spread = MarigoldNormalsPipeline.ensemble_normals(
        torch.from_numpy(given).permute(0, 3, 1, 2), True, reduction
    )
    ours, uncertainty = ensemble_normals(given, reduction)
    np.testing.assert_allclose(ours, theirs[0].permute(1, 2, 0).numpy(), atol=1e-6)  # measured 2e-7
    np.testing.assert_allclose(uncertainty[..., 0], spread[0, 0].numpy(), atol=1e-6)  # measured 1e-7
