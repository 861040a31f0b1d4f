"""Writing the foreign layouts: what comes out opens again as the very same checkpoint, and is whole or not there."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors import safe_open

from convert.__main__ import main
from convert.architecture.original import from_yaml
from convert.architecture.presets import PRESETS
from convert.export.original_yaml import original_yaml
from convert.export.tokenizer import tokenizer_files
from convert.random import SMALL, TINY
from convert.tokenizer import tokenizer_json_from_folder
from unclip_jax.checkpoints.source import open_checkpoint
from unclip_jax.conditioning.tokenizer import Tokenizer, clip_tokenizer_json

FAMILY = {name: config for name, config in SMALL.items() if name != "tiny-prior"}  # whose yaml is Karlo's
PROMPTS = ["", "a photo of a cat", "Crème brûlée, 3 of 4!", "日本 🎉 emoji", "<|endoftext|> and <start_of_text>"]


def convert(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def tensors(path):
    with safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def assert_same_tensors(first, second):
    first, second = tensors(first), tensors(second)
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], strict=True)


def assert_same_parameters(first, second):
    with open_checkpoint(first[0], **first[1]) as a, open_checkpoint(second[0], **second[1]) as b:
        assert a.params.keys() == b.params.keys()
        for name, parameter in a.params.items():
            np.testing.assert_array_equal(parameter.read(), b.params[name].read(), strict=True)


@pytest.mark.parametrize("between", ["jax", "orbax", "diffusers"])
def test_an_original_file_survives_every_layout(original, tmp_path, between):
    file, config = original
    convert(file, tmp_path / "between", "--to", between, "--config", config)
    convert(tmp_path / "between", tmp_path / "again.safetensors", "--to", "original")
    assert_same_tensors(file, tmp_path / "again.safetensors")
    assert_same_parameters(
        (file, {"config": config}),
        (tmp_path / "again.safetensors", {"config": tmp_path / "again.safetensors.yaml"}),
    )


@pytest.mark.parametrize("between", ["jax", "orbax", "diffusers"])
def test_a_diffusers_folder_survives_every_layout(folder, tmp_path, between):
    convert(folder, tmp_path / "between", "--to", between)
    convert(tmp_path / "between", tmp_path / "again", "--to", "diffusers")
    for path in folder.rglob("*.safetensors"):
        assert_same_tensors(path, tmp_path / "again" / path.relative_to(folder))
    with open_checkpoint(folder) as before, open_checkpoint(tmp_path / "again") as after:
        assert before.tokenizer.json == after.tokenizer.json
        settings = dict(after.config.scheduler_config)
        del settings["_diffusers_version"]
        assert dataclasses.replace(after.config, scheduler_config=settings) == before.config


def test_a_folder_that_the_original_code_cannot_express_is_refused(folder, tmp_path, capsys):
    """Its norms have groups of 8."""
    assert main([str(folder), str(tmp_path / "x.safetensors"), "--to", "original"]) == 2
    assert "norm_groups" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_statistics_of_embeddings_go_beside_the_original_file(original, tmp_path):
    file, config = original
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "stats.npz", mean=rng.standard_normal(48, np.float32), std=rng.random(48, np.float32) + 1)
    convert(file, tmp_path / "jax", "--config", config, "--clip-stats", tmp_path / "stats.npz")
    convert(tmp_path / "jax", tmp_path / "x.safetensors", "--to", "original")
    beside = {"config": tmp_path / "x.safetensors.yaml", "clip_stats": tmp_path / "x.safetensors.stats.npz"}
    assert_same_parameters((tmp_path / "jax", {}), (tmp_path / "x.safetensors", beside))


def test_dtype_of_what_is_written(original, tmp_path):
    file, config = original
    convert(file, tmp_path / "half", "--to", "diffusers", "--config", config, "--dtype", "float16")
    wanted = tensors(file)["first_stage_model.encoder.conv_in.weight"].astype(np.float16)
    written = tensors(tmp_path / "half" / "vae" / "diffusion_pytorch_model.safetensors")
    np.testing.assert_array_equal(written["encoder.conv_in.weight"], wanted, strict=True)
    assert {array.dtype for array in written.values()} == {np.dtype(np.float16)}
    assert json.loads((tmp_path / "half" / "text_encoder" / "config.json").read_text())["torch_dtype"] == "float16"


@pytest.mark.parametrize("target", ["diffusers", "original", "orbax"])
def test_a_failure_leaves_nothing(original, tmp_path, target, monkeypatch, capsys):
    file, config = original

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    name = tmp_path / ("x.safetensors" if target == "original" else "x")
    assert main([str(file), str(name), "--to", target, "--config", str(config)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_original_file_has_a_suffix(original, tmp_path, capsys):
    file, config = original
    assert main([str(file), str(tmp_path / "x.ckpt"), "--to", "original", "--config", str(config)]) == 2
    assert "NAME.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("preset", [*(name for name in PRESETS if name != "sd21-unclip-l"), *FAMILY])
def test_the_yaml_describes_the_same_architecture(preset, tmp_path):
    config = {**PRESETS, **FAMILY}[preset]
    path = tmp_path / "x.yaml"
    path.write_text(json.dumps(original_yaml(config)))
    assert from_yaml(path, {}) == config


def test_openai_encoder_is_described_by_its_tensors(tmp_path):
    from convert.readers import TensorInfo

    config = PRESETS["sd21-unclip-l"]
    visual, width = "embedder.model.visual", config.image_encoder.width
    shapes = {
        "conv1.weight": (width, 3, 14, 14),
        "positional_embedding": (257, width),
        "proj": (width, 768),
        **{f"transformer.resblocks.{i}.mlp.c_fc.weight": (4 * width, width) for i in range(24)},
    }
    found = {f"{visual}.{name}": TensorInfo(shape, np.dtype(np.float16)) for name, shape in shapes.items()}
    path = tmp_path / "x.yaml"
    path.write_text(json.dumps(original_yaml(config)))
    assert from_yaml(path, found) == config


def test_what_the_original_code_cannot_express_is_named():
    heads = dataclasses.replace(TINY.unet, num_heads=(2, 4, 4, 8))
    with pytest.raises(ValueError, match="num_heads"):
        original_yaml(dataclasses.replace(TINY, unet=heads))
    groups = dataclasses.replace(TINY.vae, norm_groups=16)
    with pytest.raises(ValueError, match="norm_groups"):
        original_yaml(dataclasses.replace(TINY, vae=groups))
    clean = {**TINY.scheduler_config, "prediction_type": "sample"}
    with pytest.raises(ValueError, match="prediction_type"):
        original_yaml(dataclasses.replace(TINY, scheduler_config=clean))


def test_the_tokenizer_of_an_original_file_becomes_stabilitys(tmp_path):
    """Ids agree with open_clip's but for a "!", which transformers takes for padding in Stability's folders."""
    ours = Tokenizer.from_json(clip_tokenizer_json(), "open_clip")
    for name, text in tokenizer_files(ours).items():
        (tmp_path / name).write_text(text, "utf-8")
    theirs = Tokenizer.from_json(tokenizer_json_from_folder(tmp_path), "transformers")
    plain = ["", "a photo of a cat", "Crème brûlée, 3 of 4", "日本 🎉 emoji"]
    np.testing.assert_array_equal(ours(plain), theirs(plain))
    assert theirs(["hi!"])[0].tolist()[:4] == [49406, 1883, 0, 49407]


def test_a_tokenizer_folder_survives(tmp_path):
    ours = Tokenizer.from_json(clip_tokenizer_json(), "open_clip")
    for name, text in tokenizer_files(ours).items():
        (tmp_path / name).write_text(text, "utf-8")
    first = Tokenizer.from_json(tokenizer_json_from_folder(tmp_path), "transformers")
    again = tmp_path / "again"
    again.mkdir()
    for name, text in tokenizer_files(first).items():
        (again / name).write_text(text, "utf-8")
    assert tokenizer_json_from_folder(again) == first.json
    np.testing.assert_array_equal(first(PROMPTS), Tokenizer.from_json(first.json, "transformers")(PROMPTS))
