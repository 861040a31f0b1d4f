"""What a batch has of an image."""

import numpy as np
import pytest
from PIL import Image

from unclip_jax.conditioning.clip_image import preprocess
from unclip_jax.conditioning.tokenizer import Tokenizer, open_clip_tokenizer_json
from unclip_jax.training.data import Record
from unclip_jax.training.transforms import ExampleLoader, square, to_unit


@pytest.fixture
def record(tmp_path):
    across = np.linspace(0, 255, 60).astype(np.uint8)
    Image.fromarray(np.broadcast_to(across[None, :, None], (30, 60, 3))).save(tmp_path / "a.png")
    return Record(tmp_path / "a.png", "a slope", {})


def test_everything_that_is_asked_for(record):
    tokenizer = Tokenizer.from_json(open_clip_tokenizer_json([]), "open_clip", 16)
    loader = ExampleLoader(32, "center", False, tokenizer, (16, "diffusers"), 0.0, 4, True)
    row = loader(record, np.random.default_rng(0))
    shapes = {name: value.shape for name, value in row.items()}
    assert shapes == {
        "image": (32, 32, 3),
        "tokens": (16,),
        "pixel_values": (16, 16, 3),
        "mask": (32, 32, 1),
        "low_res": (8, 8, 3),
        "depth_image": (384, 384, 3),
    }
    assert -1 <= row["image"].min() < row["image"].max() <= 1
    np.testing.assert_array_equal(row["tokens"], tokenizer(["a slope"])[0])


def test_the_networks_see_the_same_mirrored_image(record):
    loader = ExampleLoader(32, flip=True, vision=(32, "diffusers"))
    rows = [loader(record, np.random.default_rng(seed)) for seed in range(12)]
    rising = [row["image"][0, -1, 0] > row["image"][0, 0, 0] for row in rows]
    assert len(set(rising)) == 2
    for row in rows:
        pixels = np.rint((row["image"] + 1) * 127.5).astype(np.uint8)
        np.testing.assert_allclose(row["pixel_values"], preprocess(pixels, "diffusers", 32), atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(10, 40), (40, 10), (32, 32), (7, 7)])
def test_images_are_cropped_to_squares(height, width):
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    for crop in ("center", "random"):
        assert square(picture, 16, crop, rng).shape == (16, 16, 3)
    centred = square(np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (16, 64, 3)), 16, "center", rng)
    np.testing.assert_array_equal(centred[0, :, 0], np.arange(24, 40))


def test_pixels_become_minus_one_to_one():
    np.testing.assert_array_equal(to_unit(np.array([0, 255], np.uint8)), [-1, 1])
