"""What is pushed, in the hands of diffusers and of the hub's own reader of cards, from the small hub on loopback."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard

import unclip_jax
from tests import small_models
from tests.hub_server import Hub

pytestmark = pytest.mark.parity

PROMPT = "a red apple"
# diffusers' tokenizer pads to 77 whatever the tower has.
TEXT_TO_IMAGE = dataclasses.replace(
    small_models.TEXT_TO_IMAGE, text_encoder=dataclasses.replace(small_models.TEXT, context_length=77)
)


@pytest.fixture
def server(hub_server: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setenv("HF_TOKEN", "hf_writes")
    return hub_server


def test_diffusers_makes_the_same_image_of_what_was_pushed(server, tmp_path):
    unclip_jax.from_pretrained(small_models.write(TEXT_TO_IMAGE, tmp_path / "small")).push_to_hub("me/small")
    pipe = unclip_jax.from_pretrained("me/small")
    for name, content in server.repos["me/small"]["main"].items():  # diffusers knows the hub's own address alone
        (tmp_path / "pushed" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pushed" / name).write_bytes(content)
    theirs = DiffusionPipeline.from_pretrained(tmp_path / "pushed")
    assert type(theirs).__name__ == "StableDiffusionPipeline"
    theirs.set_progress_bar_config(disable=True)
    side = pipe.config.unet.sample_size
    noise = np.random.default_rng(0).standard_normal((1, side, side, 4), np.float32)
    settings = {"prompt": PROMPT, "num_inference_steps": 3, "guidance_scale": 3.0}
    made = pipe(**settings, latents=noise, output_type="np").images
    noise = torch.from_numpy(noise.transpose(0, 3, 1, 2))
    wanted = theirs(**settings, latents=noise, output_type="np").images
    np.testing.assert_allclose(made, wanted, atol=1e-5, rtol=0)  # measured 3e-6


def test_the_card_is_one_to_the_hubs_reader(server):
    unclip_jax.from_pretrained().push_to_hub("me/demo")
    card = ModelCard.load("me/demo")
    assert card.data.to_dict() == {
        "license": "mit",
        "library_name": "diffusers",
        "pipeline_tag": "image-to-image",
        "tags": ["stable-diffusion", "unclip_jax"],
    }
    assert card.text.strip().startswith("# demo\n")
