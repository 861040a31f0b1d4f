"""Estimates of depth and normals against diffusers' Marigold, from the same noise."""

from unittest import mock

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers.pipelines.marigold import MarigoldImageProcessor, pipeline_marigold_depth
from PIL import Image

import unclip_jax
from tests.estimation.double import Double
from tests.pipelines import family
from unclip_jax.distributed.mesh import local_mesh

pytestmark = pytest.mark.parity

KINDS = {"depth": "MarigoldDepthPipeline", "normals": "MarigoldNormalsPipeline"}
OURS = {"depth": "DepthPipeline", "normals": "NormalsPipeline"}
WIDTH, HEIGHT = 45, 34


def open_both(name, folder, scheduler="DDIMScheduler", **settings):
    """diffusers' estimator with random weights, and ours from its folder."""
    kind = family.Kind("StableDiffusionPipeline", "", 8, prediction_type="v_prediction")
    saved = family.build(kind, folder, scheduler, **settings)
    parts = diffusers.StableDiffusionPipeline.from_pretrained(saved).components
    parts = {name: parts[name] for name in ("unet", "vae", "scheduler", "text_encoder", "tokenizer")}
    theirs = getattr(diffusers, KINDS[name])(
        **parts, prediction_type=name, default_denoising_steps=3, default_processing_resolution=26
    )
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(folder / "marigold")
    ours = getattr(unclip_jax, OURS[name]).from_pretrained(
        folder / "marigold", "float32", local_mesh(jax.local_devices()[:1])
    )
    ours.progress = False
    return theirs, ours


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    trained = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    return open_both(request.param, tmp_path_factory.mktemp(request.param), **trained)


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"ensemble_size": 3, "output_uncertainty": True},
        {"ensemble_size": 5, "output_uncertainty": True, "ensembling_kwargs": {"reduction": "mean"}},
        {"processing_resolution": 0, "num_inference_steps": 1},
        {"match_input_resolution": False, "resample_method_input": "bicubic"},
        {"resample_method_input": "area", "resample_method_output": "nearest"},
    ],
    ids=str,
)
def test_maps(both, call):
    """Measured: depth 2e-6, normals 3e-5 (where a vector is short before it becomes a unit one)."""
    theirs, ours = both
    pixels = np.random.default_rng(1).integers(0, 256, (5, 6, 3)).astype(np.uint8)
    image = Image.fromarray(pixels).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    side = call.get("processing_resolution", 26)
    height, width = (HEIGHT * side // WIDTH, side) if side else (HEIGHT, WIDTH)
    shape = (call.get("ensemble_size", 1), -(-height // 2), -(-width // 2), 4)
    latents = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    with mock.patch.object(pipeline_marigold_depth, "torch", Double() if "ensemble_size" in call else torch):
        expected = theirs(image, latents=torch.from_numpy(latents.transpose(0, 3, 1, 2)), **call)
    made = ours(image, latents=latents, **call)
    np.testing.assert_allclose(made.prediction, expected.prediction, atol=1e-4)
    assert made.prediction.std() > 0.05
    if expected.uncertainty is not None:
        np.testing.assert_allclose(made.uncertainty, expected.uncertainty, atol=1e-4)
    processor, depth = MarigoldImageProcessor(), isinstance(ours, unclip_jax.DepthPipeline)
    show = processor.visualize_depth if depth else processor.visualize_normals
    pictures = (np.asarray(one[0], np.int16) for one in (show(expected.prediction), made.images))
    assert np.abs(np.subtract(*pictures)).max() <= 1


def test_the_distilled_one_of_one_step(tmp_path):
    """As marigold-depth-lcm-v1-0; without a last noise, which one step does not add. Measured: 2e-6."""
    theirs, ours = open_both("depth", tmp_path, "LCMScheduler", timestep_spacing="trailing")
    latents = np.random.default_rng(0).standard_normal((1, 10, 13, 4)).astype(np.float32)
    pixels = np.random.default_rng(1).integers(0, 256, (20, 26, 3)).astype(np.uint8)
    given = torch.from_numpy(latents.transpose(0, 3, 1, 2))
    expected = theirs(Image.fromarray(pixels), 1, latents=given).prediction
    np.testing.assert_allclose(ours(pixels, 1, latents=latents).prediction, expected, atol=1e-4)
