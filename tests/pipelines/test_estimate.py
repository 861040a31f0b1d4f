"""Depth and normals: bad input at the door, sizes, seeds, ensembles, and what comes out."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

import unclip_jax
from convert import save_diffusers
from tests import small_models
from tests.pipelines import small_family
from unclip_jax import cli
from unclip_jax.checkpoints.config import EstimatorConfig
from unclip_jax.checkpoints.source import open_checkpoint
from unclip_jax.pipelines.estimate import check
from unclip_jax.pipelines.estimate_arguments import EstimateArguments

CONFIG = small_family.one_level(small_models.ESTIMATE)
PHOTO = small_family.photo(height=13, width=18)  # 11x16 to the network, and 12x16 padded


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_models.write(CONFIG, tmp_path_factory.mktemp("estimate") / "depth")


@pytest.fixture(scope="module")
def depth(folder):
    return small_family.open_pipeline(folder, "DepthPipeline", progress=False)


@pytest.fixture(scope="module")
def normals(tmp_path_factory):
    config = dataclasses.replace(CONFIG, trained_for="normals")
    folder = small_models.write(config, tmp_path_factory.mktemp("estimate") / "normals")
    return small_family.open_pipeline(folder, "NormalsPipeline", progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": None}, "image is missing"),
        ({"image": [PHOTO, PHOTO[1:]]}, "image: the images are of several sizes (18x12, 18x13)"),
        ({"image": np.zeros((1, 99, 3), np.uint8)}, "image is 99x1 pixels: too thin for a longest side of 16"),
        ({"ensemble_size": 0}, "ensemble_size is 0; want an integer from 1"),
        ({"ensemble_size": True}, "ensemble_size is True"),
        ({"output_uncertainty": True}, "output_uncertainty is True and ensemble_size is 1"),
        ({"output_uncertainty": 1}, "output_uncertainty is 1; want True or False"),
        ({"processing_resolution": 15}, "processing_resolution is 15; want a multiple of 2"),
        ({"processing_resolution": -2}, "processing_resolution is -2"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"match_input_resolution": "no"}, "match_input_resolution is 'no'"),
        ({"resample_method_input": "lanczos"}, "resample_method_input is 'lanczos'; accepted: nearest, nearest-exact"),
        ({"resample_method_output": None}, "resample_method_output is None"),
        ({"latents": np.zeros((2, 6, 8, 4))}, "latents has shape (2, 6, 8, 4); want (1, 6, 8, 4)"),
        ({"seed": [1, 2]}, "seed has 2 values; want one, or 1"),
        ({"output_type": "pt"}, "output_type is 'pt'"),
        ({"scheduler": "none"}, "none"),
        ({"ensembling_kwargs": "median"}, "ensembling_kwargs is 'median'; want a dict"),
        ({"ensembling_kwargs": {"mode": 1}}, "ensembling_kwargs has mode; accepted: reduction, regularizer_strength"),
        (
            {"ensembling_kwargs": {"reduction": "closest"}},
            "ensembling_kwargs['reduction'] is 'closest'; accepted: mean",
        ),
        ({"ensembling_kwargs": {"max_res": 0}}, "ensembling_kwargs['max_res'] is 0"),
        ({"ensembling_kwargs": {"tol": -1}}, "ensembling_kwargs['tol'] is -1"),
    ],
)
def test_bad_input_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=r"\S") as caught:
        check(CONFIG, EstimateArguments(**{"image": PHOTO, **changes}))
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["num_inference_steps", "processing_resolution"])
def test_what_neither_the_checkpoint_nor_the_call_says_is_asked_for(name):
    config = dataclasses.replace(CONFIG, estimator=dataclasses.replace(CONFIG.estimator, **{name: None}))
    with pytest.raises(ValueError, match=f"{name} is missing"):
        check(config, EstimateArguments(PHOTO))
    check(config, EstimateArguments(PHOTO, **{name: 8}))


def test_a_map_is_as_large_as_its_image(depth):
    out = depth(PHOTO)
    assert out.prediction.shape == (1, 13, 18, 1)
    assert out.prediction.dtype == np.float32
    assert out.latents.shape == (1, 6, 8, 4)
    assert out.uncertainty is None
    assert (out.prediction >= 0).all()
    assert (out.prediction <= 1).all()
    assert out.images[0].size == (18, 13)
    assert out.images[0].mode == "RGB"
    assert depth(PHOTO, match_input_resolution=False).prediction.shape == (1, 11, 16, 1)


def test_a_prediction_depends_on_its_seed_and_number_alone(depth):
    both = depth([PHOTO, PHOTO[::-1]], ensemble_size=2, seed=[3, 4], output_type="latent")
    one = depth(PHOTO[::-1], ensemble_size=2, seed=4, output_type="latent", batch_size=1)
    np.testing.assert_allclose(both.latents[2:], one.latents, atol=1e-5)  # measured 7e-7
    again = depth(PHOTO, latents=np.ones((1, 6, 8, 4)), output_type="np")
    assert (again.images == again.prediction).all()


def test_several_predictions_become_one_map(depth, normals):
    for pipe, last, kinds in ((depth, 1, ("mean", "median")), (normals, 3, ("mean", "closest"))):
        for reduction in kinds:
            options = {"reduction": reduction}
            out = pipe(PHOTO, ensemble_size=3, output_uncertainty=True, ensembling_kwargs=options)
            assert out.prediction.shape == (1, 13, 18, last)
            assert out.uncertainty.shape == (1, 13, 18, 1)
            assert out.uncertainty.min() >= 0
            assert out.uncertainty.max() > 0


def test_normals_are_unit_vectors(normals):
    for matched in (False, True):
        lengths = np.linalg.norm(normals(PHOTO, match_input_resolution=matched).prediction, axis=-1)
        np.testing.assert_allclose(lengths, 1, atol=1e-5)


def test_a_run_can_be_watched(depth):
    states = list(depth.stream(PHOTO))
    assert [state.step for state in states] == [1, 2]
    seen, made = (np.asarray(one[0], np.int16) for one in (states[-1].decode(), depth(PHOTO).images))
    assert np.abs(seen - made).max() <= 4  # of 255, in colours that change fast with depth


def test_over_devices_it_is_the_same(folder, depth):
    two = small_family.open_pipeline(folder, "DepthPipeline", 2, progress=False)
    assert jax.device_count() > 1
    pair = [PHOTO, PHOTO[::-1]]
    np.testing.assert_allclose(two(pair).prediction, depth(pair).prediction, atol=1e-5)  # measured 3e-7


def test_the_class_in_the_folder_chooses_the_pipeline(folder, tmp_path):
    """And what it says of the estimator goes through diffusers' folder and back."""
    said = EstimatorConfig("disparity", 7, 640, shift_invariant=False)
    with open_checkpoint(folder) as checkpoint:
        given = dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, estimator=said))
        save_diffusers(given, tmp_path / "saved")
    opened = unclip_jax.from_pretrained(tmp_path / "saved")
    assert isinstance(opened, unclip_jax.DepthPipeline)
    assert opened.config.estimator == said
    with pytest.raises(ValueError, match="is a checkpoint for depth; NormalsPipeline takes one for normals"):
        unclip_jax.NormalsPipeline.from_pretrained(tmp_path / "saved")


def test_a_checkpoint_that_does_not_say_is_what_it_is_opened_as(tmp_path):
    folder = small_models.write(dataclasses.replace(CONFIG, trained_for=None, estimator=None), tmp_path / "silent")
    opened = unclip_jax.NormalsPipeline.from_pretrained(folder)
    assert (opened.config.task, opened.config.image_first) == ("normals", True)
    with pytest.raises(ValueError, match="8 input channels and may be for depth, normals, instruct"):
        unclip_jax.from_pretrained(folder)


def test_the_command_line_writes_maps(folder, tmp_path, capsys):
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    out = ["--out", str(tmp_path / "maps")]
    assert cli.main(["depth", str(tmp_path / "photo.png"), "--model", str(folder), "--devices", "1", *out]) == 0
    with Image.open(tmp_path / "maps" / "0001-000-near.png") as near:
        assert near.mode.startswith("I")
        assert np.asarray(near).max() > 255
    assert cli.main(["normals", str(tmp_path / "photo.png"), "--model", str(folder), *out]) == 2
    assert "is a checkpoint for depth" in capsys.readouterr().err
    assert cli.main(["depth", str(tmp_path / "none.png"), "--model", str(folder), *out]) == 2


@pytest.mark.e2e
def test_it_is_compiled_ahead_and_planned(folder, depth, tmp_path):
    executables = ["--out", str(tmp_path / "programs")]
    assert cli.main(["compile", str(folder), "--height", "12", "--width", "16", "--devices", "1", *executables]) == 0
    ahead = small_family.open_pipeline(folder, "DepthPipeline", executables=tmp_path / "programs", progress=False)
    image = small_family.photo(height=12, width=16)
    with small_family.Compilations() as compilations:
        made = ahead(image)
    assert compilations.count == 0
    np.testing.assert_allclose(made.prediction, depth(image).prediction, atol=1e-5)
    assert cli.main(["compile", str(folder), "--guidance-scale", "3", *executables]) == 2
    assert cli.main(["info", str(folder), "--plan", "--height", "12", "--width", "16", "--devices", "1"]) == 0
