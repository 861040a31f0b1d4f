"""The safety check against diffusers' StableDiffusionSafetyChecker with random weights, from the folders it writes."""

import copy

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil

from convert.safety import open_safety_checker
from tests.watermarked import natural
from unclip_jax.safety import black_out, check, embed

pytestmark = pytest.mark.parity

SIDE = 56
TOLERANCE = 1e-5  # of embeddings, relative; measured: 1e-6


@pytest.fixture(scope="module")
def pictures():
    """Twelve of different colours, (12, 90, 70, 3)."""
    tints = np.random.default_rng(3).uniform(0, 1, (12, 3))
    images = [natural(90, 70, seed, chroma=40.0) * tint for seed, tint in enumerate(tints)]
    return np.stack(images).astype(np.uint8)


def pixel_values(pictures):
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return processor([Image.fromarray(x) for x in pictures], return_tensors="pt")["pixel_values"]


def embeddings(model, pictures):
    with torch.no_grad():
        return model.visual_projection(model.vision_model(pixel_values(pictures))[1])


@pytest.fixture(scope="module")
def model(pictures):
    """Random weights; thresholds from what the images get, with every kind of verdict among them, and close ones."""
    towers = {"intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config={**towers, "hidden_size": 32, "bos_token_id": 0, "eos_token_id": 2, "vocab_size": 99},
        vision_config={**towers, "hidden_size": 64, "image_size": SIDE, "patch_size": 14},
        projection_dim=24,
    )
    torch.manual_seed(0)
    model = StableDiffusionSafetyChecker(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for concepts in (model.concept_embeds, model.special_care_embeds):
            concepts.copy_(torch.randn_like(concepts))
        unit = torch.nn.functional.normalize
        found = unit(embeddings(model, pictures))
        care, cosines = (found @ unit(c).T for c in (model.special_care_embeds, model.concept_embeds))
        model.special_care_embeds_weights.copy_(care.max(0).values + 1)
        model.special_care_embeds_weights[1] = care[:, 1].sort().values[6:8].mean()  # the upper five
        model.concept_embeds_weights.copy_(cosines.max(0).values + 1)
        ranked = cosines[:, 0].sort(descending=True).values
        model.concept_embeds_weights[0] = ranked[2] + 0.0006  # of the first two; the third by its adjustment alone
        model.concept_embeds_weights[1] = cosines[11, 1] - 0.0006  # rounds to 0.001: flagged
    return model


def verdicts(model, pictures):
    images = [x.astype(np.float32) / 255 for x in pictures]
    blackened, flags = model(images=images, clip_input=pixel_values(pictures))
    return np.stack(blackened), flags


def test_embeddings_and_verdicts(model, pictures, tmp_path):
    model.save_pretrained(tmp_path / "safety_checker")
    checker = open_safety_checker(tmp_path / "safety_checker")
    want = embeddings(model, pictures).numpy()
    for image, embedding in zip(pictures, want, strict=True):
        assert np.linalg.norm(embed(checker, image) - embedding) < TOLERANCE * np.linalg.norm(embedding)
    blackened, flags = verdicts(model, pictures)
    assert 3 <= sum(flags) <= 9
    assert check(checker, pictures) == flags
    np.testing.assert_array_equal(black_out(pictures, flags), np.rint(blackened * 255).astype(np.uint8))


@pytest.mark.parametrize("concept", range(17))
def test_thresholds_near_every_image(model, pictures, tmp_path, concept):
    """A concept's threshold on both sides of rounding for each image in turn, with and without adjustment."""
    model = copy.deepcopy(model)
    unit = torch.nn.functional.normalize
    with torch.no_grad():
        cosines = (unit(embeddings(model, pictures)) @ unit(model.concept_embeds).T)[:, concept]
        model.concept_embeds_weights.fill_(2)
        margin = (-0.0104, -0.0106, 0.0004, -0.0004, -0.0006)[concept % 5]
        model.concept_embeds_weights[concept] = cosines[concept % 12] + margin
    model.save_pretrained(tmp_path)
    assert check(open_safety_checker(tmp_path), pictures) == verdicts(model, pictures)[1]


def test_older_files_and_variants(model, pictures, tmp_path):
    """pytorch_model.bin with the older names, and half precision under a variant's name."""
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    half = copy.deepcopy(model).half()
    for name, network in (("pytorch_model.bin", model), ("pytorch_model.fp16.bin", half)):
        state = {
            f"vision_model.{k}" if k.startswith("vision_model.") else k: v for k, v in network.state_dict().items()
        }
        state["vision_model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
        torch.save(state, tmp_path / name)
    assert check(open_safety_checker(tmp_path), pictures) == verdicts(model, pictures)[1]
    want = embeddings(half.float(), pictures[:2]).numpy()
    checker = open_safety_checker(tmp_path, variant="fp16")
    for image, embedding in zip(pictures, want, strict=False):
        assert np.linalg.norm(embed(checker, image) - embedding) < TOLERANCE * np.linalg.norm(embedding)
