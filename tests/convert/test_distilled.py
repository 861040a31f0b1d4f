"""sd-turbo is known by its name, and by nothing else that it has."""

import dataclasses
import json
from pathlib import Path

import pytest

from convert.architecture.diffusers import from_folder
from convert.architecture.distilled import as_distilled, is_named_turbo
from convert.architecture.recognise import recognise
from convert.export.diffusers_configs import diffusers_configs
from convert.layouts import locate
from convert.part import with_part
from convert.random import write_random_checkpoint
from convert.rules import ldm
from tests import small_models
from tests.convert.published_files import published
from unclip_jax.checkpoints.config import CheckpointConfig, predicting
from unclip_jax.checkpoints.directory import save
from unclip_jax.checkpoints.source import open_checkpoint

TRAILING = {"_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon", "timestep_spacing": "trailing"}
TURBO = dataclasses.replace(
    small_models.TEXT_TO_IMAGE,
    scheduler="euler",
    scheduler_config={**small_models.TEXT_TO_IMAGE.scheduler_config, **TRAILING},
)
HUB = "models--stabilityai--sd-turbo/snapshots/b261bac6fd2cf515557d5d0707481eafa0485ec2"


def write_folder(folder, config=TURBO, **index):
    """The configuration files of a diffusers folder."""
    for name, data in diffusers_configs(config, "float32").items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(data | (index if name == "model_index.json" else {})))
    return folder


@pytest.mark.parametrize("name", ["sd-turbo", "SD_Turbo", "sdTurbo_v10", "my-sd-turbo-fp16", "sd.turbo", HUB])
def test_a_folder_of_this_name(name, tmp_path):
    (tmp_path / name).mkdir(parents=True)
    assert is_named_turbo(tmp_path / name)
    assert from_folder(write_folder(tmp_path / name)).distilled


@pytest.mark.parametrize(
    "name",
    ["sdxl-turbo", "turbo", "sd-turbocharged", "wsd-turbo", "sd2-turbo", HUB.replace("-turbo", "2"), "sd-turbo/x"],
)
def test_a_folder_of_another_name(name, tmp_path):
    assert not from_folder(write_folder(tmp_path / name)).distilled


def test_a_file_has_the_name_itself(tmp_path):
    """A folder may hold other files, beside it and in the hub's repository."""
    (tmp_path / HUB).mkdir(parents=True)
    for path, named in ((f"{HUB}/other.safetensors", False), (f"{HUB}/sd_turbo.safetensors", True)):
        (tmp_path / path).touch()
        assert is_named_turbo(tmp_path / path) == named


@pytest.mark.parametrize(
    ("origin", "named"),
    [("stabilityai/sd-turbo", True), ("/models/sd-turbo", True), ("sd-turbo/vae", False), (7, False)],
)
def test_a_folder_that_says_what_it_was_made_of(origin, named, tmp_path):
    """As diffusers writes it where a pipeline that was loaded is saved."""
    assert from_folder(write_folder(tmp_path, _name_or_path=origin)).distilled == named


@pytest.mark.parametrize(
    "other",
    [
        predicting(TURBO, "v_prediction"),
        dataclasses.replace(TURBO, unet=dataclasses.replace(TURBO.unet, in_channels=9)),
        dataclasses.replace(TURBO, scheduler_config={**TURBO.scheduler_config, "timestep_spacing": "leading"}),
        small_models.SMALL,
    ],
)
def test_a_name_alone_does_not_do(other):
    assert as_distilled(TURBO).distilled
    assert as_distilled(other) == other


def test_a_file_gets_the_solver_of_the_folder(tmp_path):
    path, settings = write_random_checkpoint(tmp_path / "sd_turbo.safetensors", "tiny-text-to-image")
    with open_checkpoint(path, config=settings) as checkpoint:
        assert checkpoint.config.distilled
        assert checkpoint.config.scheduler == "euler"
        assert checkpoint.config.scheduler_config["timestep_spacing"] == "trailing"
        save(checkpoint, tmp_path / "converted")
        assert CheckpointConfig.from_json(json.loads(json.dumps(checkpoint.config.to_json()))) == checkpoint.config
        assert with_part(checkpoint, "vae", tmp_path / "converted").config.distilled
        assert not with_part(checkpoint, "unet", tmp_path / "converted").config.distilled
    with open_checkpoint(tmp_path / "converted") as checkpoint:
        assert checkpoint.config.distilled
    with open_checkpoint(path, config=settings, prediction_type="v_prediction") as checkpoint:
        assert not checkpoint.config.distilled


def test_what_a_file_of_this_name_predicts_is_not_guessed():
    tensors = published("512-base")
    places, _ = locate(tensors, ldm.PLACES)
    config, note = recognise(tensors, places, "sd_turbo", metadata={}, otherwise="epsilon")
    assert config.scheduler_config["prediction_type"] == "epsilon"
    assert not note


def test_paths_are_taken_from_where_they_are(tmp_path, monkeypatch):
    (tmp_path / "sd-turbo").mkdir()
    monkeypatch.chdir(tmp_path / "sd-turbo")
    assert is_named_turbo(Path("."))
