"""CLIP models on their own, without torch: open_clip's files and transformers' folders, and what is refused."""

import dataclasses
import json
import sys
import types

import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.__main__ import main
from convert.clip import is_clip, open_open_clip, open_transformers_clip
from convert.engine import export_tensors
from convert.rules import clip as names
from convert.rules.flax import flax_rules
from tests.convert.clip_files import CONFIG, DESCRIPTION
from tests.convert.diffusers_folder import write_tokenizer
from unclip_jax.checkpoints.checkpoint import Parameter
from unclip_jax.checkpoints.networks import abstract_params
from unclip_jax.checkpoints.source import open_checkpoint


@pytest.fixture(scope="module")
def parameters():
    rng = np.random.default_rng(0)
    arrays = {
        name: np.asarray(rng.standard_normal(spec.shape), np.float32) for name, spec in abstract_params(CONFIG).items()
    }
    return {name: Parameter.of(a) for name, a in arrays.items()}


def tensors(table, parameters):
    rules = table(CONFIG, parameters).rules
    return {
        name: np.ascontiguousarray(tensor.read()).reshape(tensor.shape)
        for name, tensor in export_tensors(rules, parameters).items()
    }


@pytest.fixture
def file(tmp_path, parameters):
    save_file(tensors(names.open_clip_model, parameters), tmp_path / "clip.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": DESCRIPTION}))
    return tmp_path / "clip.safetensors"


@pytest.fixture
def folder(tmp_path, parameters):
    path = write_tokenizer(tmp_path / "clip")
    save_file(tensors(names.transformers_model, parameters), path / "model.safetensors")
    tower = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 256}
    tower["hidden_act"] = "gelu"
    config = {
        "model_type": "clip",
        "projection_dim": 24,
        "text_config": {**tower, "vocab_size": 49408},
        "vision_config": {**tower, "image_size": 28, "patch_size": 14},
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def assert_same(checkpoint, parameters):
    assert checkpoint.params.keys() == parameters.keys()
    for name, parameter in parameters.items():
        np.testing.assert_array_equal(checkpoint.params[name].read(), parameter.read())


def test_an_open_clip_file(file, parameters, tmp_path):
    assert is_clip(file)
    with open_checkpoint(file) as checkpoint:
        assert checkpoint.config == CONFIG
        assert_same(checkpoint, parameters)
    (tmp_path / "open_clip_config.json").rename(tmp_path / "mine.json")
    with open_checkpoint(file, config=tmp_path / "mine.json") as checkpoint:
        assert_same(checkpoint, parameters)
    assert main([str(file), str(tmp_path / "ours"), "--config", str(tmp_path / "mine.json")]) == 0
    with open_checkpoint(tmp_path / "ours") as checkpoint:
        assert checkpoint.config == CONFIG
        assert_same(checkpoint, parameters)


def test_a_transformers_folder(folder, parameters):
    assert is_clip(folder)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config == dataclasses.replace(CONFIG, tokenizer_dialect="transformers")
        assert_same(checkpoint, parameters)
    assert main([str(folder), "--check"]) == 0


def test_a_transformers_folder_of_flax(folder, parameters):
    """The safetensors file that FlaxCLIPModel saves on request."""

    def flax(config, params):
        return types.SimpleNamespace(rules=flax_rules(names.transformers_model(config, params).rules))

    arrays = tensors(flax, parameters)
    assert arrays["vision_model.embeddings.patch_embedding.kernel"].shape == (14, 14, 3, 64)
    assert arrays["text_projection.kernel"].shape == (64, 24)
    save_file(arrays, folder / "model.safetensors", {"format": "flax"})
    with open_checkpoint(folder) as checkpoint:
        assert_same(checkpoint, parameters)


@pytest.fixture
def library(monkeypatch, file):
    """open_clip's four functions that are used, over one model."""
    module = types.SimpleNamespace(
        get_model_config=lambda name: {"Tiny": DESCRIPTION}.get(name),
        get_pretrained_cfg=lambda name, tag: {"real": {"url": "x"}, "openai": {"quick_gelu": True}}.get(tag),
        list_pretrained_tags_by_model=lambda name: ["real", "openai"],
        download_pretrained=lambda published: str(file),
    )
    monkeypatch.setitem(sys.modules, "open_clip", module)


def test_names_of_open_clip(library, file, parameters):
    for name in ("open_clip:Tiny/real", f"open_clip:Tiny/{file}"):
        with open_checkpoint(name) as checkpoint:
            assert checkpoint.config == CONFIG
            assert checkpoint.source == name
            assert_same(checkpoint, parameters)
    with open_checkpoint("open_clip:Tiny/openai") as checkpoint:
        assert checkpoint.config.image_encoder.activation == "quick_gelu"
    with pytest.raises(ValueError, match="no architecture 'Huge'"):
        open_checkpoint("open_clip:Huge/real")
    with pytest.raises(ValueError, match="no weights 'mine' of Tiny; it has real, openai"):
        open_checkpoint("open_clip:Tiny/mine")


def test_without_open_clip(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert main(["open_clip:ViT-H-14/laion2b_s32b_b79k", str(tmp_path / "x")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'unclip-jax[convert]'" in line


def test_broken_descriptions(file, folder, tmp_path, capsys):
    description = tmp_path / "open_clip_config.json"
    for content, words in (
        ("[]", "JSON object"),
        ("{", "not valid JSON"),
        (json.dumps({"model_cfg": {**DESCRIPTION, "custom_text": True}}), "custom_text"),
        (json.dumps({"model_cfg": {**DESCRIPTION, "quick_gelu": 1}}), "quick_gelu"),
        (json.dumps({"model_cfg": {**DESCRIPTION, "vision_cfg": {"layers": [3, 4, 6, 3]}}}), "vision_cfg"),
    ):
        description.write_text(content)
        with pytest.raises(ValueError, match=words):
            open_open_clip(file)
    description.unlink()
    with pytest.raises(ValueError, match="misshapen"):  # taken for ViT-H-14
        open_open_clip(file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "text_config": 3}))
    with pytest.raises(ValueError, match="text_config"):
        open_transformers_clip(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer|vocab"):
        open_transformers_clip(folder)
