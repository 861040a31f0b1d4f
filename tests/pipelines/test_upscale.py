"""Large images are upscaled in tiles: a tile sees what is in it alone, and the decoder's too."""

import numpy as np
import pytest

from tests.pipelines.small_family import arguments, open_pipeline, photo
from unclip_jax import Memory
from unclip_jax.models.tiling import decode_tiled
from unclip_jax.pipelines.upscale import LARGEST_SIDE, LARGEST_WHOLE_SIDE

HEIGHT, WIDTH, TILE = 16, 24, 16
IMAGE = photo(0, HEIGHT, WIDTH)
NOISE = {
    name: np.random.default_rng(channels).standard_normal((1, HEIGHT, WIDTH, channels), np.float32)
    for name, channels in (("latents", 4), ("low_res_noise", 3))
}


@pytest.fixture(scope="module")
def pipe(family_folder):
    return open_pipeline(family_folder("UPSCALE"), "UpscalePipeline")


def once(pipe, columns=slice(None), **changes):
    """One step of DDIM for some columns of the image: each place of it is the network's output there alone."""
    given = {"num_inference_steps": 1, "eta": 0.0} | {name: noise[:, :, columns] for name, noise in NOISE.items()}
    return pipe(**arguments("upscaling", image=IMAGE[:, columns], **given | changes))


def test_where_one_tile_is_alone_it_is_an_image_of_its_own(pipe):
    """Tiles at columns 0..16 and 8..24."""
    tiled = once(pipe, tile=TILE).latents
    left, right = (once(pipe, columns).latents for columns in (slice(0, TILE), slice(WIDTH - TILE, WIDTH)))
    np.testing.assert_allclose(tiled[:, :, :8], left[:, :, :8], atol=2e-5)
    np.testing.assert_allclose(tiled[:, :, -8:], right[:, :, -8:], atol=2e-5)
    between, a, b = tiled[:, :, 8:-8], left[:, :, 8:], right[:, :, :8]
    assert (between >= np.minimum(a, b) - 2e-5).all()
    assert (between <= np.maximum(a, b) + 2e-5).all()
    assert np.abs(tiled - once(pipe).latents).max() > 1e-3


def test_a_tile_that_holds_everything_changes_nothing(pipe):
    want = once(pipe).latents
    for tile in (WIDTH, 4 * WIDTH):
        np.testing.assert_array_equal(once(pipe, tile=tile).latents, want)


@pytest.mark.e2e
def test_what_is_made_in_tiles_is_decoded_in_tiles(pipe, family_folder):
    made = once(pipe, tile=TILE, output_type="np")
    latents = once(pipe, tile=TILE).latents
    vae = pipe.networks["vae"]
    want = decode_tiled(vae.merge(vae.params), latents / pipe.config.vae.scaling_factor, TILE)
    np.testing.assert_allclose(made.images, np.clip(np.asarray(want) / 2 + 0.5, 0, 1), atol=1e-5)
    whole = pipe.decode_latents(latents)
    assert np.abs(made.images - whole).max() > 1e-4
    seamless = open_pipeline(family_folder("UPSCALE"), "UpscalePipeline", memory=Memory(decoding="seamless"))
    np.testing.assert_allclose(once(seamless, tile=TILE, output_type="np").images, whole, atol=1e-5)


@pytest.mark.parametrize(
    ("side", "tile"), [(LARGEST_WHOLE_SIDE, None), (LARGEST_WHOLE_SIDE + 8, (8, 2)), (LARGEST_SIDE, (8, 2))]
)
def test_tiles_begin_with_large_images(side, tile, pipe):
    """Of the side that the network was trained at, 8 here."""
    image = np.zeros((8, side, 3), np.uint8)
    assert pipe.check(image=image).tile == tile
    assert pipe.check(image=np.swapaxes(image, 0, 1)).tile == tile


def test_too_large_an_image_is_refused(pipe):
    with pytest.raises(ValueError, match=f"image has a side of {LARGEST_SIDE + 8} pixels; want at most {LARGEST_SIDE}"):
        pipe.check(image=np.zeros((8, LARGEST_SIDE + 8, 3), np.uint8))


@pytest.mark.parametrize("tile", [0, -8, 3, 7.5, "16", True])
def test_a_tile_that_does_not_fit_is_refused(tile, pipe):
    with pytest.raises(ValueError, match=r"tile is .*; want (a multiple of 2|an integer from 1)"):
        pipe.check(image=IMAGE, tile=tile)
