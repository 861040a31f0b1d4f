"""Ensembles: what must hold of any, and the result of those whose answer is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unclip_jax.estimation import ensemble_depth, ensemble_normals

SCENE = np.linspace(0, 1, 48, dtype=np.float32).reshape(6, 8, 1)


@given(st.integers(2, 6), st.integers(0, 99), st.sampled_from(["mean", "median"]))
def test_maps_that_differ_by_factor_and_constant_agree(count, seed, reduction):
    rng = np.random.default_rng(seed)
    maps = np.stack([rng.uniform(0.2, 0.6) * SCENE + rng.uniform(0, 0.3) for _ in range(count)]).astype(np.float32)
    depth, uncertainty = ensemble_depth(maps, reduction=reduction)
    np.testing.assert_allclose(depth, SCENE, atol=2e-3)  # the start is exact; the steps leave it by 1e-3 at most
    assert uncertainty.max() < 2e-3


def test_a_factor_alone_keeps_zero_in_its_place():
    maps = np.stack([0.5 * SCENE + 0.1, 0.25 * SCENE + 0.05])
    depth, _ = ensemble_depth(maps, shift_invariant=False)
    assert depth.min() > 0.1
    assert depth.max() == 1


def test_maps_with_a_scale_are_reduced_as_they_are():
    maps = np.stack([SCENE, 0.5 * SCENE, 0.25 * SCENE])
    depth, uncertainty = ensemble_depth(maps, scale_invariant=False, shift_invariant=False)
    np.testing.assert_array_equal(depth, 0.5 * SCENE)
    np.testing.assert_array_equal(uncertainty, 0.25 * SCENE)
    with pytest.raises(ValueError, match="shift_invariant without scale_invariant"):
        ensemble_depth(maps, scale_invariant=False)


def test_normals_that_agree_are_certain():
    normals = np.zeros((3, 2, 2, 3), np.float32)
    normals[..., 2] = 1
    for reduction in ("mean", "closest"):
        made, uncertainty = ensemble_normals(normals, reduction)
        np.testing.assert_array_equal(made, normals[0])
        assert uncertainty.max() == 0
    normals[2] = [1, 0, 0]
    made, uncertainty = ensemble_normals(normals)
    np.testing.assert_array_equal(made[0, 0], [0, 0, 1])
    assert 0.1 < uncertainty.min() < 0.5
