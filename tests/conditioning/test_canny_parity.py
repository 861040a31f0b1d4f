"""Canny's edges against OpenCV's, pixel for pixel."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests import readme
from unclip_jax.conditioning import canny

pytestmark = pytest.mark.parity

PICTURES = [
    *sorted((readme.ROOT / "docs" / "images").glob("*.[jp][pn]g")),
    *sorted((readme.ROOT / "unclip_jax" / "demo" / "pictures").glob("*.png"))[:8],
]
THRESHOLDS = [(100, 200), (0, 0), (50, 150), (10.7, 33.9), (255, 255), (300, 900)]


@pytest.mark.parametrize("thresholds", THRESHOLDS)
def test_pictures(thresholds):
    assert len(PICTURES) > 12
    for path in PICTURES:
        image = np.asarray(Image.open(path).convert("RGB"))
        want = cv2.Canny(image, *thresholds)
        np.testing.assert_array_equal(canny(image, *thresholds), np.stack([want] * 3, 2), path.name)


@given(
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    seed=st.integers(0, 9999),
    coarse=st.sampled_from([1, 32, 128]),
    gray=st.booleans(),
    low=st.integers(0, 700),
    more=st.integers(0, 900),
)
@settings(max_examples=300, deadline=None)
def test_noise(size, seed, coarse, gray, low, more):
    image = (np.random.default_rng(seed).integers(0, 256, (*size, 3)) // coarse * coarse).astype(np.uint8)
    image = image[..., 0] if gray else image
    np.testing.assert_array_equal(canny(image, low, low + more)[..., 1], cv2.Canny(image, low, low + more))
