"""Our own directories: written whole or not at all, read back bit for bit, refused by name when broken."""

import json
import re
import shutil

import ml_dtypes
import numpy as np
import pytest

from tests.convert.diffusers_folder import random_tensors, write_folder
from unclip_jax.checkpoints.directory import INDEX, open_directory, save
from unclip_jax.checkpoints.source import open_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    write_folder(folder, random_tensors())
    return folder


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("written") / "checkpoint"
    with open_checkpoint(source) as checkpoint:
        save(checkpoint, path, shard_bytes=1 << 20)
    return path


@pytest.mark.parametrize("layout", ["safetensors", "orbax"])
@pytest.mark.parametrize("dtype", [None, np.float16, ml_dtypes.bfloat16])
def test_what_is_written_is_read(source, tmp_path, dtype, layout):
    dtype = None if dtype is None else np.dtype(dtype)
    seen = []
    with open_checkpoint(source) as before:
        save(before, tmp_path / "x", layout=layout, dtype=dtype, progress=seen.append)
        with open_directory(tmp_path / "x") as after:
            assert after.config == before.config
            assert after.tokenizer.json == before.tokenizer.json
            assert sum(seen) == after.nbytes
            for name, parameter in before.params.items():
                want = parameter.read().astype(dtype or parameter.dtype)
                assert after.params[name].dtype == want.dtype
                np.testing.assert_array_equal(after.params[name].read(), want, strict=True)


def test_layers_of_a_tower_are_read_one_by_one(written):
    with open_directory(written) as checkpoint:
        parameter = checkpoint.params["text_encoder.layers.fc1.kernel"]
        assert len(parameter.pieces) == parameter.shape[0] == 2
        np.testing.assert_array_equal(parameter.read_layer(1), parameter.read()[1])


def test_several_shards(written):
    assert len(list(written.glob("params-*.safetensors"))) > 2
    recorded = json.loads((written / "provenance.json").read_text())
    assert recorded["converter"].startswith("unclip_jax ")


def test_nothing_is_overwritten(source, tmp_path):
    (tmp_path / "x").mkdir()
    with open_checkpoint(source) as checkpoint, pytest.raises(FileExistsError, match="exists"):
        save(checkpoint, tmp_path / "x")
    assert list((tmp_path / "x").iterdir()) == []


def test_a_failure_half_way_leaves_nothing(source, tmp_path):
    def interrupt(nbytes):
        raise KeyboardInterrupt

    with open_checkpoint(source) as checkpoint, pytest.raises(KeyboardInterrupt):
        save(checkpoint, tmp_path / "x", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def first_shard(folder):
    return sorted(folder.glob("params-*.safetensors"))[0]


BROKEN = {
    "no configuration": (lambda f: (f / "config.json").write_text("{}"), "config.json"),
    "configuration is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "configuration is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    "tokenizer is another file": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    "index without a map": (lambda f: (f / INDEX).write_text("{}"), "weight_map"),
    "a parameter is missing": (
        lambda f: edit(f / INDEX, lambda d: d["weight_map"].pop("unet.conv_in.kernel")),
        "unet.conv_in.kernel",
    ),
    "a parameter too many": (
        lambda f: edit(f / INDEX, lambda d: d["weight_map"].update({"unet.x": "params-00001-of-00002.safetensors"})),
        "params-00001-of-00002",
    ),
    "a shard elsewhere": (
        lambda f: edit(f / INDEX, lambda d: d["weight_map"].update({"unet.conv_in.kernel": "../secret"})),
        "../secret",
    ),
    "a shard is missing": (lambda f: first_shard(f).unlink(), "params-00001"),
    "a shard is truncated": (lambda f: first_shard(f).write_bytes(first_shard(f).read_bytes()[:-9]), "params-00001"),
    "a shard is empty": (lambda f: first_shard(f).write_bytes(b""), "params-00001"),
    "another architecture": (
        lambda f: edit(f / "config.json", lambda d: d["text_encoder"].update(mlp_width=33)),
        "text_encoder.layers.fc1",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_named(written, tmp_path, what):
    folder = tmp_path / "broken"
    shutil.copytree(written, folder)
    breaks, word = BROKEN[what]
    breaks(folder)
    with pytest.raises(ValueError, match=re.escape(word)) as caught, open_checkpoint(folder):
        pass
    assert "\n" not in str(caught.value)
