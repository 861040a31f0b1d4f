"""The watermark against the original's library, bit for bit, and its colours against OpenCV's, all of them."""

import json

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from imwatermark import WatermarkDecoder, WatermarkEncoder

from tests.golden_weights import GOLDEN
from tests.watermarked import digests, gradients, natural, noise
from unclip_jax.watermark import _from_yuv, _to_yuv, embed_watermark, read_watermark

pytestmark = pytest.mark.parity

IMAGES = {
    "noise": lambda height, width, seed: noise(height, width),
    "gradients": lambda height, width, seed: gradients(height, width),
    "photograph": natural,
    "strong colours": lambda height, width, seed: natural(height, width, seed, chroma=60.0),
    "one colour": lambda height, width, seed: np.tile(noise(seed + 1, 1)[-1], (height, width, 1)),
}


def library_embeds(image, mark=b"SDV2"):
    encoder = WatermarkEncoder()
    encoder.set_watermark("bytes", mark)
    return encoder.encode(image[..., ::-1].copy(), "dwtDct")[..., ::-1]


def library_reads(image, length=4):
    return WatermarkDecoder("bytes", 8 * length).decode(image[..., ::-1].copy(), "dwtDct")


def test_colours_are_opencvs():
    """Every colour there, every YUV back."""
    for first in range(256):
        x = np.stack(np.meshgrid([first], range(256), range(256), indexing="ij"), -1)[0].astype(np.uint8)
        np.testing.assert_array_equal(np.stack(_to_yuv(x), -1), cv2.cvtColor(x, cv2.COLOR_RGB2YUV))
        y, u, v = np.moveaxis(x.astype(np.int32), -1, 0)
        np.testing.assert_array_equal(_from_yuv(y, u, v), cv2.cvtColor(x, cv2.COLOR_YUV2RGB))


@given(
    kind=st.sampled_from(sorted(IMAGES)),
    height=st.integers(256, 330),
    width=st.integers(256, 330),
    seed=st.integers(0, 99),
    mark=st.sampled_from([b"SDV2", b"StableDiffusionV1", b"\x00\xff\x80", b"a"]),
)
@settings(max_examples=40)
def test_bit_for_bit(kind, height, width, seed, mark):
    image = IMAGES[kind](height, width, seed)
    marked = embed_watermark(image, mark)
    np.testing.assert_array_equal(marked, library_embeds(image, mark))
    for picture in (image, marked):  # what the vote says of an image without a mark is equal too
        assert read_watermark(picture, len(mark)) == library_reads(picture, len(mark))
    if kind in ("noise", "photograph") and len(mark) <= 4:  # longer marks have too few votes a bit
        assert library_reads(marked, len(mark)) == mark


@pytest.mark.parametrize("shape", [(128, 512), (8, 8192), (8192, 8), (768, 768)])
def test_shapes_that_the_library_takes(shape):
    image = natural(*shape, seed=1)
    np.testing.assert_array_equal(embed_watermark(image), library_embeds(image))
    assert read_watermark(image) == library_reads(image)


def test_recorded_digests_are_the_librarys():
    assert digests(library_embeds) == json.loads((GOLDEN / "watermark.json").read_text())["sha256"]
