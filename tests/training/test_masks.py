"""Masks for inpainting: both kinds, some whole, of any size, the same from the same generator."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from unclip_jax.training.masks import random_mask


@given(st.integers(8, 96), st.integers(8, 96), st.integers(0, 2**32))
def test_a_mask_is_its_generators_at_any_size(height, width, seed):
    mask = random_mask(np.random.default_rng(seed), height, width)
    assert mask.shape == (height, width, 1)
    assert mask.dtype == np.float32
    assert set(np.unique(mask)) <= {0.0, 1.0}
    assert mask.any()
    np.testing.assert_array_equal(mask, random_mask(np.random.default_rng(seed), height, width))


def test_whole_and_partial_masks_have_their_shares():
    masks = [random_mask(np.random.default_rng(seed), 128, 128) for seed in range(400)]
    whole = np.mean([mask.all() for mask in masks])
    assert 0.18 < whole < 0.36  # a quarter, and strokes that happen to cover everything
    covered = [mask.mean() for mask in masks if not mask.all()]
    assert 0.15 < np.mean(covered) < 0.6
    assert min(covered) < 0.05 < 0.7 < max(covered)
    assert not any(random_mask(np.random.default_rng(s), 64, 64, 0.0).all() for s in range(3))
    assert all(random_mask(np.random.default_rng(s), 64, 64, 1.0).all() for s in range(9))


def test_a_share_is_a_share():
    with pytest.raises(ValueError, match="whole_share is 2"):
        random_mask(np.random.default_rng(0), 8, 8, 2)
