"""Depth-to-image checkpoints through both layouts without torch, and what their descriptions may not say."""

import dataclasses
import json

import numpy as np
import pytest

from convert.architecture.diffusers import from_folder
from convert.architecture.original import from_yaml
from convert.architecture.presets import PRESETS, published
from convert.export.diffusers import save_diffusers
from convert.export.diffusers_configs import diffusers_configs
from convert.export.original_yaml import original_yaml
from convert.readers import CheckpointError
from unclip_jax.checkpoints.checkpoint import Checkpoint, Parameter
from unclip_jax.checkpoints.networks import abstract_params
from unclip_jax.checkpoints.source import open_checkpoint
from unclip_jax.conditioning.tokenizer import Tokenizer, clip_tokenizer_json
from unclip_jax.models.configs import DepthConfig, TextConfig, UNetConfig, VAEConfig
from unclip_jax.reference import Reference

DEPTH = DepthConfig(
    image_size=64,
    stem_width=8,
    stage_widths=(16, 32, 64),
    stage_depths=(2, 1, 1),
    norm_groups=4,
    width=16,
    layers=3,
    heads=2,
    mlp_width=24,
    taps=(0, 2),
    reassemble_widths=(16, 8),
    fusion_width=8,
)
CONFIG = dataclasses.replace(
    published("epsilon", 8, in_channels=5, depth_estimator=DEPTH),
    unet=UNetConfig(
        in_channels=5,
        block_out_channels=(16, 32),
        attention_levels=(True, False),
        num_heads=(2, 4),
        only_cross_attention=(False, False),
        cross_attention_dim=16,
        norm_groups=8,
        sample_size=8,
    ),
    vae=VAEConfig(block_out_channels=(8, 8), norm_groups=4),
    text_encoder=TextConfig(width=16, layers=1, heads=2, mlp_width=32),
    reference=Reference.DIFFUSERS,
    scheduler="pndm",
    preprocess="diffusers",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random checkpoint as a diffusers folder, and its parameters."""
    rng = np.random.default_rng(0)
    params = {}
    for name, spec in abstract_params(CONFIG).items():
        array = rng.standard_normal(spec.shape, np.float32)
        params[name] = Parameter.of(array)
    tokenizer = Tokenizer.from_json(clip_tokenizer_json(), "open_clip")
    path = tmp_path_factory.mktemp("depth") / "folder"
    save_diffusers(Checkpoint(CONFIG, tokenizer, params, "random"), path)
    return path, params


def test_a_folder_survives(folder):
    path, params = folder
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config.task == "depth-to-image"
        assert checkpoint.config.depth_estimator == DEPTH
        assert checkpoint.params.keys() == params.keys()
        for name, parameter in params.items():
            np.testing.assert_array_equal(checkpoint.params[name].read(), parameter.read())


@pytest.mark.parametrize(
    ("file", "key", "value", "words"),
    [
        ("depth_estimator/config.json", "is_hybrid", False, "is_hybrid is False"),
        ("depth_estimator/config.json", "is_hybrid", ..., "is_hybrid is None"),
        ("depth_estimator/config.json", "readout_type", "add", "readout_type is 'add'"),
        ("depth_estimator/config.json", "backbone_config", [1], "backbone_config is"),
        ("depth_estimator/config.json", "backbone_config", {}, "backbone_config: layer_type is"),
        ("depth_estimator/config.json", "backbone_config", None, "neck_hidden_sizes is"),
        ("depth_estimator/config.json", "neck_hidden_sizes", [1, 2, 3, 4], "neck_hidden_sizes is"),
        ("depth_estimator/config.json", "hidden_act", "relu", "hidden_act is 'relu'"),
        ("depth_estimator/config.json", "num_attention_heads", 3, "want a multiple of heads, 3"),
        ("depth_estimator/config.json", "backbone_out_indices", [2, 5, 2, 1], "taps"),
        ("depth_estimator/config.json", "num_hidden_layers", 5000, "layers"),
        ("depth_estimator/config.json", "image_size", 70, "image_size is 70"),
        ("feature_extractor/preprocessor_config.json", "size", {"height": 64, "width": 32}, "size is"),
        ("feature_extractor/preprocessor_config.json", "image_mean", [0, 0, 0], "image_mean"),
        ("feature_extractor/preprocessor_config.json", "size", 64, None),
        ("feature_extractor/preprocessor_config.json", "ensure_multiple_of", 32, None),
    ],
)
def test_descriptions(folder, tmp_path, file, key, value, words):
    for path in folder[0].rglob("*.json"):
        copy = tmp_path / path.relative_to(folder[0])
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    data = json.loads((tmp_path / file).read_text())
    data[key] = value
    (tmp_path / file).write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))
    if words is None:
        assert from_folder(tmp_path).depth_estimator == DEPTH
        return
    with pytest.raises(CheckpointError, match=words) as caught:
        from_folder(tmp_path)
    assert file in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stage_widths": (16, 32)}, "three stages"),
        ({"stage_widths": (16, 32, 66)}, "multiples of norm_groups"),
        ({"taps": (1,)}, "taps"),
        ({"taps": (2, 1)}, "taps"),
        ({"taps": (0, 1)}, "last of 3 layers"),
        ({"image_size": 8}, "image_size is 8"),
    ],
)
def test_architectures_that_are_none(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(DEPTH, **changes)


def test_the_original_knows_one_estimator(tmp_path):
    data = original_yaml(PRESETS["512-depth"])
    node = data["model"]["params"]["depth_stage_config"]
    for change, words in (
        ({"target": "os.system"}, "depth_stage_config.target is 'os.system'"),
        ({"params": {"model_type": "dpt_large"}}, "model_type is 'dpt_large'; accepted: 'dpt_hybrid'"),
        ({"params": {"model_type": "dpt_hybrid", "depth": 3}}, "do not know: depth"),
    ):
        data["model"]["params"]["depth_stage_config"] = {**node, **change}
        (tmp_path / "x.yaml").write_text(json.dumps(data))
        with pytest.raises(CheckpointError, match=words):
            from_yaml(tmp_path / "x.yaml", {})
    without = dataclasses.replace(PRESETS["512-depth"], depth_estimator=None)
    (tmp_path / "x.yaml").write_text(json.dumps(original_yaml(without)))
    assert from_yaml(tmp_path / "x.yaml", {}) == without
    with pytest.raises(ValueError, match="needs a depth estimator"):
        diffusers_configs(without, "float32")
    with pytest.raises(ValueError, match="one depth estimator"):
        original_yaml(dataclasses.replace(PRESETS["512-depth"], depth_estimator=DEPTH))
