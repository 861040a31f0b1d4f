"""Estimators that predict their map at once (Lotus): what a call has not, names of folders, and that they run."""

import dataclasses
import json

import numpy as np
import pytest

import unclip_jax
from convert import save_diffusers
from convert.architecture.lotus import as_lotus
from convert.readers import CheckpointError
from tests import small_models
from tests.pipelines import small_family
from unclip_jax.checkpoints.source import open_checkpoint
from unclip_jax.pipelines.estimate import check
from unclip_jax.pipelines.estimate_arguments import EstimateArguments

ALONE = small_family.one_level(small_models.DIRECT)
WITH_NOISE = dataclasses.replace(ALONE, unet=dataclasses.replace(ALONE.unet, in_channels=8))
PHOTO = small_family.photo(height=13, width=18)  # 11x16 to the network, of which 10x16 are in the latents


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (ALONE, {"num_inference_steps": 2}, "num_inference_steps is 2; this estimator has 1"),
        (ALONE, {"scheduler": "ddim"}, "scheduler is given, and this estimator predicts its map at once"),
        (WITH_NOISE, {"eta": 0.5}, "eta is given, and this estimator predicts"),
        (ALONE, {"ensemble_size": 3}, "ensemble_size is 3, and this estimator reads no noise"),
        (ALONE, {"latents": np.zeros((1, 5, 8, 4))}, "latents is given, and this estimator reads no noise"),
        (
            WITH_NOISE,
            {"image": np.zeros((1, 16, 3), np.uint8)},
            "image is 16x1 pixels to the network; want sides of at",
        ),
    ],
)
def test_what_it_does_not_have_is_refused_by_name(config, changes, message):
    with pytest.raises(ValueError, match=message):
        check(config, EstimateArguments(**{"image": PHOTO, **changes}))


@pytest.mark.parametrize("config", [ALONE, WITH_NOISE], ids=["the image alone", "with noise"])
def test_it_estimates(config, tmp_path):
    folder = small_models.write(config, tmp_path / "model")
    pipe = small_family.open_pipeline(folder, "DepthPipeline", progress=False)
    out = pipe(PHOTO, output_type="np")
    assert out.prediction.shape == (1, 13, 18, 1)
    assert out.latents.shape == (1, 5, 8, 4)
    assert out.prediction.std() > 0
    other = pipe(PHOTO, output_type="np", seed=1)
    assert (other.prediction == out.prediction).all() == (config is ALONE)
    assert pipe(PHOTO, match_input_resolution=False).prediction.shape == (1, 10, 16, 1)


@pytest.mark.parametrize("config", [ALONE, WITH_NOISE], ids=["the image alone", "with noise"])
@pytest.mark.parametrize("kind", [None, "disparity"])
def test_a_folder_is_read_and_written(config, kind, tmp_path):
    written = dataclasses.replace(config, estimator=dataclasses.replace(config.estimator, prediction_type=kind))
    with open_checkpoint(small_models.write(written, tmp_path / "model")) as checkpoint:
        save_diffusers(checkpoint, tmp_path / "saved")
        params = {name: parameter.read() for name, parameter in checkpoint.params.items()}
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["_class_name"] == ("LotusDPipeline" if config is ALONE else "LotusGPipeline")
    opened = unclip_jax.from_pretrained(tmp_path / "saved")
    assert type(opened) is unclip_jax.DepthPipeline
    assert (opened.config.direct, opened.config.estimator.prediction_type) == (True, kind)
    with open_checkpoint(tmp_path / "saved") as again:
        assert params.keys() - again.params.keys() <= {"text_encoder.projection.kernel"}
        for name, parameter in again.params.items():
            np.testing.assert_array_equal(parameter.read(), params[name])


@pytest.mark.parametrize(
    ("name", "task"),
    [("lotus-depth-g-v2-1-disparity", "depth"), ("lotus-normal-d-v1-1", "normals"), ("my-lotus", None)],
)
def test_the_name_says_what_is_estimated(name, task, tmp_path):
    plain = dataclasses.replace(ALONE, trained_for=None, estimator=None)
    made = as_lotus(plain, tmp_path / name, None)
    assert made.trained_for == task
    if task is None:
        with pytest.raises(ValueError, match="it is an estimator for one of depth, normals; open it with the pipeline"):
            _ = made.task


def test_another_unet_is_refused(tmp_path):
    for changes, message in (
        ({"class_embedding_size": 6}, "Lotus needs 'projection' of 4"),
        ({"in_channels": 5}, "5;"),
    ):
        config = dataclasses.replace(ALONE, unet=dataclasses.replace(ALONE.unet, **changes))
        with pytest.raises(CheckpointError, match=message):
            as_lotus(config, tmp_path / "lotus-depth", None)
