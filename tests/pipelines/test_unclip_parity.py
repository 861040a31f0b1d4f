"""Whole pipelines from folders that diffusers saved, against diffusers itself: same weights, noise and images.

The largest difference of the final image, in 0..1, must be at most 1e-3; measured: 6e-5, most cases 1e-5.
"""

import functools

import numpy as np
import pytest
import torch
from transformers import (
    CLIPTokenizer,
)

from tests.pipelines.live_unclip import FORMS, both, build, open_ours, open_theirs, photo
from tests.references import write_tokenizer

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # within diffusers
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),  # there too
]

TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Form -> diffusers' pipeline and ours, from one folder."""
    tokenizer = CLIPTokenizer.from_pretrained(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))

    @functools.cache
    def pair(form):
        folder = tmp_path_factory.mktemp(form)
        build(form, tokenizer).save_pretrained(folder)
        return open_theirs(folder), open_ours(folder)

    return pair


# What differs from 20 steps of PNDM with guidance 10 at noise level 0, and why.
CASES = {
    "published defaults": {},
    "ddim": {"scheduler": "ddim"},
    "ddim, stochastic": {"scheduler": "ddim", "eta": 1.0},
    "ddim, few steps, no guidance": {"scheduler": "ddim", "num_inference_steps": 5, "guidance_scale": 1.0},
    "pndm, many steps": {"num_inference_steps": 30, "noise_level": 500},
    "pndm, fewer steps than it has history": {"num_inference_steps": 5},
    "dpm++": {"scheduler": "dpm++2m", "noise_level": 999},
    "dpm++, few steps: lower order at the end": {"scheduler": "dpm++2m", "num_inference_steps": 5},
    "dpm++, many steps": {"scheduler": "dpm++2m", "num_inference_steps": 30, "guidance_scale": 1.0},
    "karras": {"scheduler": "dpm++2m-karras"},
    "karras, few steps": {"scheduler": "dpm++2m-karras", "num_inference_steps": 5, "noise_level": 500},
    "ddpm": {"scheduler": "ddpm", "noise_level": 300},
    "euler": {"scheduler": "euler"},
    "euler, ancestral": {"scheduler": "euler-a", "num_inference_steps": 30},
    "heun": {"scheduler": "heun-karras", "num_inference_steps": 10},
    "linear multistep": {"scheduler": "lms-exponential"},
    "dpm2": {"scheduler": "dpm2-beta", "num_inference_steps": 10},
    "dpm2, ancestral": {"scheduler": "dpm2-a", "num_inference_steps": 10},
    "negative prompt": {"prompt": "Two cats, 3 dogs & a café!", "negative_prompt": "blurry; ugly!!"},
    "wide": {"size": (32, 64), "scheduler": "ddim", "num_inference_steps": 5},
    "several pictures, several of each": {"pictures": 2, "repeats": 2, "scheduler": "ddim", "num_inference_steps": 5},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_final_images(case, form, pipelines, monkeypatch):
    theirs, ours = pipelines(form)
    settings = {"num_inference_steps": 20, "guidance_scale": 10.0, "noise_level": 0, "prompt": "a photo", **CASES[case]}
    images = [photo(seed) for seed in range(settings.get("pictures", 1))]
    if len(images) > 1:
        settings["prompt"] = [settings["prompt"]] * len(images)
    wanted, made = both(monkeypatch, theirs, ours, image=images if len(images) > 1 else images[0], **settings)
    assert wanted.std() > 0.02  # an image, and not a flat one
    assert ((wanted > 0) & (wanted < 1)).mean() > 0.3  # most of it not clipped
    assert np.abs(made - wanted).max() <= TOLERANCE


def test_embeddings_instead_of_an_image(pipelines, monkeypatch):
    embeds = np.random.default_rng(2).standard_normal((1, 24), np.float32)
    settings = {"num_inference_steps": 5, "noise_level": 100, "prompt": "a photo"}
    wanted, made = both(monkeypatch, *pipelines("l"), image_embeds=embeds, **settings)
    assert np.abs(made - wanted).max() <= TOLERANCE


@pytest.mark.parametrize("written", ["fp16", "bin", "sharded"])
def test_other_forms_of_the_folder(written, pipelines, tmp_path, monkeypatch):
    """Half precision as a variant, torch files, shards."""
    theirs, _ = pipelines("h")
    saved = {"fp16": {"variant": "fp16"}, "bin": {"safe_serialization": False}, "sharded": {"max_shard_size": "300KB"}}
    suffixes = {"fp16": "*.fp16.safetensors", "bin": "*.bin", "sharded": "*.index.json"}
    original = build("h", theirs.tokenizer)
    (original.to(torch.float16) if written == "fp16" else original).save_pretrained(tmp_path, **saved[written])
    assert list(tmp_path.rglob(suffixes[written]))
    opening = {"variant": "fp16"} if written == "fp16" else {}
    settings = {"image": photo(0), "num_inference_steps": 5, "prompt": "a photo", "guidance_scale": 10.0}
    wanted, made = both(monkeypatch, open_theirs(tmp_path, **opening), open_ours(tmp_path, **opening), **settings)
    assert np.abs(made - wanted).max() <= TOLERANCE
