"""Every network live against diffusers and transformers, with random weights, at several sizes.

open_clip's towers: tests/convert/test_clip_parity.py. Tolerances are relative (L2).
"""

import pytest

from tests.models import comparisons
from tests.models.comparisons import TOLERANCE

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("fully_compiled")]


@pytest.mark.parametrize("name", comparisons.UNETS)
def test_unet(name):
    assert comparisons.unet_error(name) < TOLERANCE


def test_features_of_a_unet():
    assert max(comparisons.unet_feature_errors().values()) < TOLERANCE


@pytest.mark.parametrize(("height", "width", "batch"), [(8, 8, 1), (32, 12, 3), (40, 64, 1), (13, 9, 1), (7, 22, 2)])
def test_unet_sizes(height, width, batch):
    assert comparisons.unet_error("unclip", height, width, batch) < TOLERANCE


@pytest.mark.parametrize("name", comparisons.VAES)
@pytest.mark.parametrize(("height", "width"), [(48, 64), (72, 24)])
def test_vae(name, height, width):
    assert max(comparisons.vae_errors(name, height, width)) < TOLERANCE


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 40), (33, 21), (50, 14)])
def test_tiling(height, width):
    """diffusers' tiled decoding and encoding, at sizes that tiles fill and that they do not."""
    assert max(comparisons.tiling_errors(height, width, tile=16)) < TOLERANCE


@pytest.mark.parametrize("name", comparisons.TOWERS)
def test_text_tower(name):
    assert comparisons.text_error(name) < TOLERANCE


@pytest.mark.parametrize("name", comparisons.TOWERS)
def test_vision_tower(name):
    assert comparisons.vision_error(name) < TOLERANCE


def test_depth_estimator():
    assert comparisons.depth_error() < TOLERANCE
