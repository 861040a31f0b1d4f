"""Every network of the reduced models against recordings of the original PyTorch implementation, one by one.

The recordings and how they were made: tests/golden/components.json. Tolerances are relative to the size of the whole
array; beside each is the error that was measured.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden_weights import GOLDEN
from unclip_jax.conditioning.clip_image import preprocess
from unclip_jax.conditioning.noise_augmentation import noise_image_embeddings
from unclip_jax.models.timestep import timestep_embedding
from unclip_jax.sampling.schedule import alphas_cumprod

pytestmark = pytest.mark.usefixtures("fully_compiled")

RECORDED = np.load(GOLDEN / "components.npz")
PROMPTS = json.loads((GOLDEN / "components.json").read_text("utf-8"))["prompts"]
IMAGES = np.load(GOLDEN / "preprocess.npz")
MODELS = {"h": "unclip_h", "l": "unclip_l"}


def relative_error(got, want):
    return np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want)


@pytest.fixture(params=MODELS)
def model(request, golden_pipeline):
    """The pipeline of a reduced model and the prefix of its own recordings."""
    return golden_pipeline(MODELS[request.param]), request.param


@pytest.mark.filterwarnings("ignore:the prompt is 120 tokens long:UserWarning")
def test_tokens(model):
    np.testing.assert_array_equal(model[0].tokenizer(PROMPTS), RECORDED["tokens"])


def test_text_encoder(model):
    network = model[0].networks["text_encoder"]
    states = jax.jit(lambda params, tokens: network.merge(params)(tokens))(network.params, RECORDED["tokens"])
    assert relative_error(states, RECORDED["context"]) < 1e-5  # 5e-7


def test_image_encoder(model):
    pipe, which = model
    network = pipe.networks["image_encoder"]
    embeds = jax.jit(lambda params, x: network.merge(params)(x))(network.params, RECORDED["pixels"])
    assert relative_error(embeds[0], RECORDED[f"{which}_image_embeds"][0]) < 1e-5  # 5e-7


@pytest.mark.parametrize("dialect", ["original", "original-kornia-0.6.0"])
def test_images_to_embeddings(model, dialect):
    pipe, which = model
    network = pipe.networks["image_encoder"]
    pixels = np.stack([preprocess(IMAGES[f"{name}_picture"], dialect) for name in ("landscape", "small", "square")])
    embeds = jax.jit(lambda params, x: network.merge(params)(x))(network.params, pixels)
    want = RECORDED[f"{which}_image_embeds" + ("_kornia060" if "kornia" in dialect else "")]
    assert relative_error(embeds, want) < 1e-5  # 5e-7


def test_preprocessing_of_one_image_in_full():
    pixels = preprocess(IMAGES["landscape_picture"], "original")
    np.testing.assert_allclose(pixels, RECORDED["pixels"][0], rtol=0, atol=1e-5)  # 1.4e-6


def test_noise_augmentation(model):
    pipe, which = model
    schedule = alphas_cumprod(pipe.config.image_noising, "original")
    mean, std = RECORDED[f"{which}_mean"], RECORDED[f"{which}_std"]
    np.testing.assert_array_equal(pipe.parts.noising["mean"], mean)
    np.testing.assert_array_equal(pipe.parts.noising["std"], std)
    recorded = {
        name: RECORDED[f"{which}_augmentation_{name}"] for name in ("embeds", "noise", "noised", "level_embeds")
    }
    got = noise_image_embeddings(
        recorded["embeds"],
        RECORDED["augmentation_levels"],
        recorded["noise"],
        alphas_cumprod=jnp.asarray(schedule),
        mean=mean,
        std=std,
    )
    width = recorded["embeds"].shape[1]
    assert relative_error(got[:, :width], recorded["noised"]) < 1e-5  # 1e-6
    np.testing.assert_allclose(got[:, width:], recorded["level_embeds"], rtol=0, atol=1e-4)  # 6e-8


def test_unet(model):
    """Calls at whole and at fractional timesteps, and one whose class vectors are all zeros."""
    pipe, which = model
    network = pipe.networks["unet"]
    call = jax.jit(lambda params, *arguments: network.merge(params)(*arguments))
    x, context = RECORDED["unet_x"], RECORDED["context"][[1, 0]]
    recorded = (RECORDED[name] for name in ("unet_timesteps", f"{which}_unet_classes", f"{which}_unet_out"))
    for timesteps, classes, want in zip(*recorded, strict=True):
        assert relative_error(call(network.params, x, timesteps, context, classes), want) < 1e-5  # 1.7e-6


def test_vae(model):
    pipe, _ = model
    network = pipe.networks["vae"]
    picture = RECORDED["vae_picture"].astype(np.float32) / 127.5 - 1
    posterior = jax.jit(lambda params, x: network.merge(params).encode(x))(network.params, picture)
    mean, logvar = np.split(RECORDED["vae_moments"], 2, axis=-1)
    assert relative_error(posterior.mean, mean) < 1e-5  # 3e-6
    assert relative_error(posterior.mean, RECORDED["vae_mode"]) < 1e-5
    assert relative_error(posterior.logvar, np.clip(logvar, -30, 20)) < 1e-5  # 3e-6
    scale = pipe.config.vae.scaling_factor
    assert relative_error(scale * posterior.sample(RECORDED["vae_noise"]), RECORDED["vae_latents"]) < 1e-5  # 2e-6
    decoded = jax.jit(lambda params, z: network.merge(params).decode(z))(
        network.params, RECORDED["vae_latents"] / scale
    )
    assert relative_error(decoded, RECORDED["vae_decoded"]) < 1e-5  # 3e-6


@pytest.mark.parametrize("width", [8, 320, 768, 1024])
def test_timestep_embedding(width):
    got = timestep_embedding(jnp.asarray([0, 1, 17.5, 500, 999]), width)
    np.testing.assert_allclose(got, RECORDED[f"timestep_embedding_{width}"], rtol=0, atol=1e-4)  # 6e-5
