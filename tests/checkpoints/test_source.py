"""Which kind of checkpoint stands at a path, and the options that have no meaning for it."""

import json

import numpy as np
import pytest

from convert.__main__ import main
from unclip_jax.checkpoints.orbax import read_params
from unclip_jax.checkpoints.source import open_checkpoint


@pytest.fixture(scope="module")
def ours(original, tmp_path_factory):
    path = tmp_path_factory.mktemp("ours") / "jax"
    assert main([str(original[0]), str(path), "--config", str(original[1])]) == 0
    return path


def test_the_way_pictures_are_read_can_be_chosen(original):
    with open_checkpoint(original[0], config=original[1], preprocess="diffusers") as checkpoint:
        assert checkpoint.config.preprocess == "diffusers"
    with pytest.raises(ValueError, match="preprocess is 'mine'; accepted: "):
        open_checkpoint(original[0], config=original[1], preprocess="mine")


@pytest.mark.parametrize(
    ("which", "options", "words"),
    [
        ("original", {"variant": "fp16"}, "variant is 'fp16', but .* is one file"),
        ("original", {"revision": "main"}, "only hub ids have revisions"),
        ("original", {"config": "no.yaml"}, "config: no such file: no.yaml, nor is it one of .*512-depth"),
        ("original", {"clip_stats": "no.npz"}, "clip_stats: no such file: no.npz"),
        ("folder", {"config": "x.yaml"}, "config: only for original files"),
        ("folder", {"ema": True}, "ema: only for original files"),
        ("folder", {"variant": "../x"}, "variant is '../x'"),
        ("ours", {"variant": "fp16"}, "it has no variants"),
        ("ours", {"clip_stats": "x.npz"}, "clip_stats: only for original files"),
    ],
)
def test_options_without_meaning(which, options, words, request):
    path = request.getfixturevalue(which)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        open_checkpoint(path[0] if which == "original" else path, **options)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="neither a converted checkpoint"):
        open_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder, and not a hub id"):
        open_checkpoint(tmp_path / "nothing" / "here")
    (tmp_path / "x.ckpt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"x\.ckpt"):
        open_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    "metadata", [{}, {"tree_metadata": 3}, {"tree_metadata": {"a": {}}}, {"tree_metadata": {"a": {"key_metadata": []}}}]
)
def test_orbax_metadata_that_lists_no_arrays(metadata, tmp_path):
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "_METADATA").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="lists no named arrays"):
        read_params(tmp_path)


def test_orbax_arrays_of_another_kind(tmp_path):
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "params", args=ocp.args.PyTreeSave({"a": np.arange(3)}))
    with pytest.raises(ValueError, match="a has dtype int64; accepted: float64"):
        read_params(tmp_path)
