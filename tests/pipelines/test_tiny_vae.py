"""A tiny autoencoder as the VAE of a pipeline, and beside one for previews."""

import numpy as np
import pytest

import unclip_jax
from convert.export.diffusers import save_diffusers
from tests.convert.tiny_vae_files import SMALL, checkpoint
from tests.pipelines import small_family
from tests.pipelines.small_family import HEIGHT, WIDTH, arguments, open_pipeline
from unclip_jax import Memory, TinyVAE
from unclip_jax.checkpoints.source import open_tiny_vae


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_diffusers(checkpoint(SMALL), tmp_path_factory.mktemp("tiny") / "model")[0]


@pytest.fixture(scope="module")
def tiny(source, family):
    return TinyVAE.from_pretrained(source, "float32", family("text to image").mesh)


@pytest.fixture(scope="module")
def from_images(source, family_folder):
    """Image to image with it in the place of the VAE."""
    return open_pipeline(family_folder("TEXT_TO_IMAGE"), "ImageToImagePipeline", vae=source, progress=False)


@pytest.fixture
def streaming(family, tiny):
    """Text to image with it beside the VAE."""
    pipe = family("text to image")
    pipe.tiny_vae = tiny
    yield pipe
    pipe.tiny_vae = None


def test_an_image_begins_a_run_without_noise_of_its_encoding(from_images):
    """What an image is encoded to is not drawn: a run that adds no noise to it gives it back."""
    pixels = np.float32(small_family.photo()[None]) / 127.5 - 1
    encoded = from_images.vae_encode(pixels)
    assert encoded.shape == (1, HEIGHT // 2, WIDTH // 2, 4)
    nothing = np.zeros_like(encoded)
    call = arguments("image to image", noise=nothing, num_inference_steps=1, strength=1.0, eta=0.0)
    a, b = (from_images(**{**call, "seed": seed}).latents for seed in (1, 2))
    np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="a tiny autoencoder predicts latents: nothing is drawn"):
        from_images(**arguments("image to image", posterior_noise=nothing))


def test_tiles_are_joined(from_images):
    latents = np.random.default_rng(0).standard_normal((1, 8, 16, 4), np.float32)
    whole = from_images.decode_latents(latents)
    assert whole.shape == (1, 16, 32, 3)
    np.testing.assert_array_equal(from_images.decode_latents(latents, in_tiles=16), whole)
    # Far from the second tile, of which the decoder sees nothing there.
    tiled = from_images.decode_latents(latents, in_tiles=12)
    np.testing.assert_allclose(tiled[:, :, :4], whole[:, :, :4], atol=1e-6)


def test_bands_of_rows_are_refused(source, family_folder):
    with pytest.raises(ValueError, match="decoding is 'seamless', which a tiny autoencoder does not have"):
        open_pipeline(
            family_folder("TEXT_TO_IMAGE"), "TextToImagePipeline", vae=source, memory=Memory(decoding="seamless")
        )


def test_previews_are_its_images_of_the_estimate(streaming, tiny):
    state = next(streaming.stream(**arguments("text to image")))
    (image,) = state.preview("tiny")
    assert image.size == (WIDTH, HEIGHT)
    want = tiny.decode_latents(state.x0)[0]
    np.testing.assert_allclose(np.asarray(image) / 255, want, atol=0.5 / 255 + 1e-6)
    assert state.preview()[0].size == (WIDTH // 2, HEIGHT // 2)


def test_without_one_there_are_no_such_previews(family):
    state = next(family("text to image").stream(**arguments("text to image")))
    with pytest.raises(ValueError, match="the pipeline has no tiny_vae"):
        state.preview("tiny")
    with pytest.raises(ValueError, match="decoder is 'full'; accepted: 'linear', 'tiny'"):
        state.preview("full")


def test_one_for_other_latents_is_refused(streaming, tiny, source):
    config = unclip_jax.models.AutoencoderTinyConfig(latent_channels=5)
    streaming.tiny_vae = TinyVAE(config, tiny.network, tiny.mesh, tiny.dtype, str(source))
    with pytest.raises(ValueError, match="tiny_vae has 5 latent channels; the pipeline's VAE has 4"):
        streaming.stream(**arguments("text to image"))


def test_the_demo_models_own():
    """It is for the demo model's latents."""
    with open_tiny_vae() as ours, unclip_jax.open_checkpoint() as demo:
        assert ours.config.vae.factor == demo.config.vae.factor
        assert ours.config.vae.latent_channels == demo.config.vae.latent_channels


@pytest.mark.e2e
@pytest.mark.parametrize(("model", "pipeline"), [("INSTRUCT", "InstructPipeline"), ("ESTIMATE", "DepthPipeline")])
def test_an_image_beside_the_latents_is_encoded_by_it(model, pipeline, source, family_folder):
    pipe = open_pipeline(family_folder(model), pipeline, vae=source, progress=False)
    out = pipe(small_family.photo(), num_inference_steps=1, output_type="latent")
    assert np.isfinite(out.latents).all()
