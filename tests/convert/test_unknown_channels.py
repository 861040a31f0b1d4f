"""Checkpoints whose UNet reads more than any task here gives it: described, but not run as something else."""

import dataclasses
import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import unclip_jax
from convert.architecture.diffusers import from_folder
from convert.architecture.recognise import recognise
from convert.export.diffusers_configs import diffusers_configs
from convert.layouts import locate
from convert.part import with_part
from convert.random import write_random_checkpoint
from convert.readers import CheckpointError, TensorInfo
from convert.rules import ldm
from tests import small_models
from tests.convert.published_files import published
from unclip_jax import cli
from unclip_jax.checkpoints.source import open_checkpoint

NAMED = "its UNet has 8 input channels and may be for depth, normals, instruct; open it with the pipeline for it"
WIDE = dataclasses.replace(
    small_models.TEXT_TO_IMAGE, unet=dataclasses.replace(small_models.TEXT_TO_IMAGE.unet, in_channels=8)
)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return small_models.write(WIDE, tmp_path_factory.mktemp("wide") / "model")


@pytest.mark.parametrize(
    "open_it",
    [
        unclip_jax.from_pretrained,
        unclip_jax.TextToImagePipeline.from_pretrained,
        unclip_jax.ImageToImagePipeline.from_pretrained,
        unclip_jax.InpaintPipeline.from_pretrained,
    ],
)
def test_no_pipeline_takes_it(open_it, wide):
    with pytest.raises(ValueError, match=f"^{wide}: {NAMED}"):
        open_it(wide)


def test_it_is_described(wide, capsys):
    assert cli.main(["info", str(wide), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"]["config"]["unet"]["in_channels"] == 8
    assert cli.main(["info", str(wide), "--plan"]) == 2
    assert "8 input channels" in capsys.readouterr().err


def test_a_folder_of_text_to_image_by_its_class(tmp_path):
    """As somebody saves it who has no other class."""
    for name, data in diffusers_configs(small_models.TEXT_TO_IMAGE, "float32").items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        edited = data | ({"in_channels": 8} if name == "unet/config.json" else {})
        (tmp_path / name).write_text(json.dumps(edited))
    config = from_folder(tmp_path)
    assert config.unet.in_channels == 8
    with pytest.raises(ValueError, match=NAMED):
        diffusers_configs(config, "float32")


def test_another_vae_fits_and_another_unet_does_not(wide, tmp_path):
    other = small_models.write(small_models.TEXT_TO_IMAGE, tmp_path / "other")
    with open_checkpoint(wide) as checkpoint:
        assert with_part(checkpoint, "vae", other).config == WIDE
    with open_checkpoint(other) as checkpoint, pytest.raises(ValueError, match=NAMED):
        with_part(checkpoint, "unet", wide)


def test_an_original_file_is_for_what_the_pipeline_is_for(tmp_path):
    narrow, yaml = write_random_checkpoint(tmp_path / "narrow.safetensors", "tiny-text-to-image")
    tensors, first = load_file(narrow), "model.diffusion_model.input_blocks.0.0.weight"
    tensors[first] = np.concatenate([tensors[first], 2 * tensors[first]], axis=1)
    save_file(tensors, file := tmp_path / "wide.safetensors")
    config = tmp_path / "wide.yaml"
    config.write_text(re.sub(r"\bin_channels: 4\b", "in_channels: 8", yaml.read_text()))
    with pytest.raises(ValueError, match=NAMED):
        unclip_jax.from_pretrained(file, config=config)
    pipe = unclip_jax.InstructPipeline.from_pretrained(file, "float32", config=config)
    assert pipe.config.task == "instruct"
    kernel = np.asarray(pipe.networks["unet"].params["conv_in.kernel"])
    np.testing.assert_array_equal(kernel[:, :, 4:], 2 * kernel[:, :, :4])


def test_a_file_without_a_description():
    """With the tensors of Stable Diffusion 2 but for the first layer it has a configuration, with others none."""
    tensors = published("512-base")
    places, _ = locate(tensors, ldm.PLACES)
    first, last = (f"model.diffusion_model.{name}.weight" for name in ("input_blocks.0.0", "out.2"))
    tensors[first] = TensorInfo((320, 8, 3, 3), tensors[first].dtype)
    config, _ = recognise(tensors, places, "x", metadata={}, prediction="v_prediction")
    assert config.unet.in_channels == 8
    assert config.scheduler_config["prediction_type"] == "v_prediction"
    with pytest.raises(ValueError, match=NAMED):
        _ = config.task
    tensors[last] = TensorInfo((8, 320, 3, 3), tensors[last].dtype)
    with pytest.raises(CheckpointError, match=f"^x: {NAMED}"):
        recognise(tensors, places, "x", metadata={})
