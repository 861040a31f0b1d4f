"""A checkpoint's configuration on disk: what is written is read, and nothing else."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.architecture.presets import PRESETS
from tests.convert.diffusers_folder import CONFIG
from unclip_jax.checkpoints.config import OF_TWO_LATENTS, CheckpointConfig, ClipConfig, for_task, read_config

CLIP = ClipConfig(dataclasses.replace(CONFIG.text_encoder, projection_dim=8), CONFIG.image_encoder, "open_clip")


@pytest.mark.parametrize("config", [*PRESETS.values(), CONFIG, CLIP], ids=[*PRESETS, "small", "clip"])
def test_what_is_written_is_read(config):
    assert read_config(json.loads(json.dumps(config.to_json()))) == config


BAD = [
    (lambda d: d.pop("format"), "format"),
    (lambda d: d.update(format_version=2), "format_version 2"),
    (lambda d: d.pop("unet"), "unet"),
    (lambda d: d.update(extra=1), "extra"),
    (lambda d: d["unet"].update(depth=3), "depth"),
    (lambda d: d["unet"].update(in_channels="4"), "in_channels is '4'"),
    (lambda d: d["unet"].update(in_channels=True), "in_channels is True"),
    (lambda d: d["unet"].update(num_heads=[5]), "num_heads"),
    (lambda d: d["vae"].update(block_out_channels=None), "block_out_channels"),
    (lambda d: d["text_encoder"].update(activation="relu"), "relu"),
    (lambda d: d["text_encoder"].update(layers=0), "layers"),
    (lambda d: d.update(reference="a1111"), "a1111"),
    (lambda d: d.update(scheduler_config=[]), "scheduler_config"),
    (lambda d: d.update(image_noising={"beta_schedule": "sigmoid"}), "sigmoid"),
]


@pytest.mark.parametrize(("change", "word"), BAD, ids=[word for _, word in BAD])
def test_what_is_broken_is_named(change, word):
    data = json.loads(json.dumps(CONFIG.to_json()))
    change(data)
    with pytest.raises(ValueError, match=word) as caught:
        CheckpointConfig.from_json(data)
    assert "\n" not in str(caught.value)


def test_towers_of_a_clip_model_share_a_space():
    with pytest.raises(ValueError, match="projection_dim"):
        dataclasses.replace(CLIP, text_encoder=dataclasses.replace(CLIP.text_encoder, projection_dim=9))


def test_tasks():
    tasks = {name: config.task for name, config in PRESETS.items()}
    assert tasks == {
        "sd21-unclip-h": "variations",
        "sd21-unclip-l": "variations",
        "768-v": "text-to-image",
        "512-base": "text-to-image",
        "512-depth": "depth-to-image",
        "512-inpainting": "inpaint",
        "x4-upscaler": "upscale",
    }


def of_channels(channels, latents=4):
    unet = dataclasses.replace(PRESETS["512-base"].unet, in_channels=channels)
    vae = dataclasses.replace(PRESETS["512-base"].vae, latent_channels=latents)
    return dataclasses.replace(PRESETS["512-base"], unet=unet, vae=vae)


@given(st.integers(1, 40).filter(lambda n: n not in (4, 5, 7, 8, 9)))
def test_a_task_is_not_made_up(channels):
    with pytest.raises(ValueError, match=rf"UNets with {channels} input channels are not known; known: 4, 5, 7, 9, 8"):
        _ = of_channels(channels).task
    with pytest.raises(ValueError, match="are not known"):
        _ = dataclasses.replace(of_channels(channels), image_encoder=PRESETS["sd21-unclip-h"].image_encoder).task
    assert of_channels(channels, latents=channels).task == "text-to-image"


def test_tasks_of_eight_channels_are_named():
    with pytest.raises(ValueError, match="has 8 input channels and may be for depth, normals, instruct; open it with"):
        _ = of_channels(8).task


@pytest.mark.parametrize("task", OF_TWO_LATENTS)
def test_eight_channels_are_for_what_is_said(task):
    assert for_task(of_channels(8), ["inpaint", task]).task == task
    assert for_task(of_channels(8), ["inpaint"]) == of_channels(8)
    said = dataclasses.replace(of_channels(8), trained_for="depth")
    assert for_task(said, [task]).task == "depth"
    assert dataclasses.replace(of_channels(9), trained_for=task).task == "inpaint"
