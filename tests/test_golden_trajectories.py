"""Whole runs of the reduced models against recordings of the original PyTorch implementation, through the public API.

Every case starts from the recorded noise, once from the recorded embedding and text states, once from the image and
the prompts themselves. The recordings and how they were made: tests/golden/trajectories.json.
"""

import json

import numpy as np
import pytest

from tests.golden_weights import GOLDEN

pytestmark = pytest.mark.usefixtures("fully_compiled")

RECORDED = np.load(GOLDEN / "trajectories.npz")
CASES = json.loads((GOLDEN / "trajectories.json").read_text("utf-8"))["cases"]
QUICK = ("unclip_h_ddim", "unclip_l_ddim")  # every scheduler, and the lack of guidance, is another program


def arguments(name):
    """What both forms of a case pass to the pipeline."""
    case, start = CASES[name], RECORDED[f"{name}_start"]
    chosen = ("scheduler", "num_inference_steps", "guidance_scale", "noise_level", "image_weights", "mix_noise_level")
    return {
        **{key: case[key] for key in chosen if key in case},
        "latents": start,
        "image_noise": RECORDED[f"{name}_image_noise"],
        "num_images_per_prompt": len(start),
        "height": 8 * start.shape[1],
        "width": 8 * start.shape[2],
    }


def from_images(name):
    case = CASES[name]
    pictures = [RECORDED[picture] for picture in case["pictures"]]
    return {"image": pictures, "prompt": case["prompt"], "negative_prompt": case["negative_prompt"]}


def from_embeds(name):
    case = CASES[name]
    return {
        "image_embeds": RECORDED[f"{name}_image_embeds"],
        "prompt_embeds": RECORDED[f'states of "{case["prompt"]}"'],
        "negative_prompt_embeds": RECORDED[f'states of "{case["negative_prompt"]}"'],
    }


@pytest.mark.parametrize("form", [from_embeds, from_images])
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.e2e) for name in CASES]
)
def test_latents(golden_pipeline, name, form):
    pipe = golden_pipeline(CASES[name]["model"])
    got = pipe(**arguments(name), **form(name), output_type="latent").latents
    want = RECORDED[f"{name}_end"]
    assert np.linalg.norm(got - want) < 5e-5 * np.linalg.norm(want)  # 3e-6


def test_embeddings_of_images(golden_pipeline):
    for name, case in CASES.items():
        got = golden_pipeline(case["model"]).encode_image_embeds([RECORDED[picture] for picture in case["pictures"]])
        want = RECORDED[f"{name}_image_embeds"]
        assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)  # 5e-7


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["unclip_h_ddim_defaults", "unclip_h_mix"])
def test_images(golden_pipeline, name):
    got = golden_pipeline(CASES[name]["model"])(**arguments(name), **from_images(name), output_type="np").images
    want = np.clip(RECORDED[f"{name}_decoded"] / 2 + 0.5, 0, 1)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-4)  # 7e-6
