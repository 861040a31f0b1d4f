"""The invisible watermark: the library's recorded images, reading what was written, refusals."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.golden_weights import GOLDEN
from tests.watermarked import digests, natural, noise
from unclip_jax.watermark import embed_watermark, read_watermark


def test_marked_images_are_those_of_the_library():
    assert digests(embed_watermark) == json.loads((GOLDEN / "watermark.json").read_text())["sha256"]


@given(
    height=st.integers(256, 400),
    width=st.integers(256, 400),
    seed=st.integers(0, 999),
    mark=st.binary(min_size=1, max_size=4),
)
@settings(max_examples=15)
def test_reads_what_was_written(height, width, seed, mark):
    image = natural(height, width, seed)
    before = image.copy()
    marked = embed_watermark(image, mark)
    assert marked.shape == image.shape
    assert marked.dtype == np.uint8
    assert read_watermark(marked, len(mark)) == mark
    np.testing.assert_array_equal(image, before)
    assert np.abs(marked.astype(int) - image).mean() < 3  # levels; measured: 2


def test_the_mark_is_stabilitys_unless_told():
    assert read_watermark(embed_watermark(natural(256, 256, 0))) == b"SDV2"
    assert read_watermark(natural(256, 256, 0)) != b"SDV2"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: embed_watermark(noise(255, 256)), "image is 256x255 pixels; .* 256x256"),
        (lambda: read_watermark(noise(16, 16)), "image is 16x16 pixels"),
        (lambda: embed_watermark(noise(256, 256).astype(np.float32)), "image is float32"),
        (lambda: embed_watermark(noise(256, 256)[..., :2]), r"image is uint8 \(256, 256, 2\)"),
        (lambda: embed_watermark(noise(256, 256), b""), "mark is 0 bytes; .* holds 1 to 128"),
        (lambda: embed_watermark(noise(256, 256), b"x" * 129), "mark is 129 bytes; .* holds 1 to 128"),
        (lambda: embed_watermark(noise(256, 256), "SDV2"), "mark is 'SDV2'; want bytes"),
        (lambda: embed_watermark(noise(7, 10000)), "mark is 4 bytes"),
        (lambda: read_watermark(noise(256, 256), 0), "length is 0 bytes"),
        (lambda: read_watermark(noise(256, 256), -1), "length is -1 bytes"),
        (lambda: read_watermark(noise(256, 256), 4.0), "length is 4.0"),
    ],
)
def test_what_cannot_be_marked_is_refused(call, words):
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)
