"""The statistics of image embeddings in every form that they come in."""

import json

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save, save_file

from convert import statistics
from convert.random import TINY
from convert.readers import CheckpointError
from convert.statistics import STATISTICS, embedding_statistics, read_statistics
from tests.convert.torch_files import mapping, name, several, storage, tensor, torch_bytes
from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.checkpoints.source import open_checkpoint

MEAN, STD = np.arange(4, dtype=np.float32), np.arange(1, 5, dtype=np.float32)


def vector(key):
    return tensor(storage(key=key, size=4), shape=(4,), strides=(1,))


def pair_bytes(*codes):
    return torch_bytes(several(*codes), {"a": MEAN.tobytes(), "b": STD.tobytes()})


def test_every_form(tmp_path):
    save_file({"mean": MEAN[None], "std": STD[None]}, tmp_path / "x.safetensors")
    np.savez(tmp_path / "x.npz", mean=MEAN, std=STD)
    (tmp_path / "x.th").write_bytes(pair_bytes(vector("a"), vector("b")))
    for folder in (tmp_path / "image_normalizer", tmp_path / "alone"):
        folder.mkdir()
        save_file({"mean": MEAN, "std": STD}, folder / "diffusion_pytorch_model.safetensors")
    for path in ("x.safetensors", "x.npz", "x.th", "", "alone"):
        for found, want in zip(read_statistics(tmp_path / path), (MEAN, STD), strict=True):
            np.testing.assert_array_equal(found, want)
            assert found.dtype == np.float32


def test_what_is_no_statistics(tmp_path):
    save_file({"weight": MEAN}, tmp_path / "other.safetensors")
    (tmp_path / "three.th").write_bytes(pair_bytes(vector("a"), vector("b"), vector("b")))
    (tmp_path / "mapping.th").write_bytes(torch_bytes(mapping({"mean": vector("a")}), {"a": MEAN.tobytes()}))
    (tmp_path / "names.th").write_bytes(pair_bytes(vector("a"), name("torch.float32")))
    save_file({"mean": MEAN, "std": STD[:2]}, tmp_path / "lengths.safetensors")
    save_file({"mean": MEAN, "std": 0 * STD}, tmp_path / "zero.safetensors")
    (tmp_path / "index.json").write_text(json.dumps({"weight_map": {"mean": "other.safetensors"}}))
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=path.name):
            read_statistics(path)
    for missing in ("no.npz", "no.th", "no.safetensors"):
        with pytest.raises(FileNotFoundError):
            read_statistics(tmp_path / missing)


def test_statistics_of_a_checkpoint(tmp_path):
    vision = TINY.image_encoder
    found = embedding_statistics(TINY, None)
    assert not found[STATISTICS[0]].any()
    assert (found[STATISTICS[1]] == 1).all()
    width = np.ones(vision.projection_dim, np.float32)
    np.savez(tmp_path / "x.npz", mean=2 * width, std=3 * width)
    found = embedding_statistics(TINY, tmp_path / "x.npz")
    assert (found[STATISTICS[0]] == 2).all()
    assert (found[STATISTICS[1]] == 3).all()
    np.savez(tmp_path / "short.npz", mean=width[1:], std=width[1:])
    with pytest.raises(ValueError, match=f"{vision.projection_dim - 1} features; the image encoder gives"):
        embedding_statistics(TINY, tmp_path / "short.npz")
    without = CheckpointConfig(**{**vars(TINY), "image_encoder": None})
    assert embedding_statistics(without, None) == {}


def normalizer(mean, std):
    """The files of a repository with diffusers' image_normalizer, and with much else."""
    weights = save({"mean": mean[None], "std": std[None]})
    part = {"config.json": b'{"embedding_dim": %d}' % len(mean), "diffusion_pytorch_model.safetensors": weights}
    others = {"model_index.json": b"{}", "unet/config.json": b"{ }", "unet/diffusion_pytorch_model.bin": b"weights"}
    return {"main": {**others, **{f"image_normalizer/{name}": content for name, content in part.items()}}}


def test_published_statistics_are_fetched(golden_files, hub_server, monkeypatch):
    file, options = golden_files("unclip_l")
    options = dict(options)
    with np.load(options.pop("clip_stats")) as arrays:
        want = [arrays[name].reshape(-1).astype(np.float32) for name in ("mean", "std")]
    monkeypatch.setattr(statistics, "PUBLISHED_WIDTH", len(want[0]))
    hub_server.repos[statistics.PUBLISHED] = normalizer(*want)
    for given in ({}, {"clip_stats": statistics.PUBLISHED}, {"clip_stats": f"{statistics.PUBLISHED}/image_normalizer"}):
        with open_checkpoint(file, **options, **given) as checkpoint:
            for name, array in zip(STATISTICS, want, strict=True):
                np.testing.assert_array_equal(checkpoint.params[name].read(), array)
            if not given:
                assert checkpoint.files[-1].name == "diffusion_pytorch_model.safetensors"
        assert len(hub_server.bodies()) == 2
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with open_checkpoint(file, **options) as checkpoint:
        np.testing.assert_array_equal(checkpoint.params[STATISTICS[1]].read(), want[1])


def test_statistics_that_cannot_be_fetched(golden_files, hub_server, monkeypatch):
    """The message says which file would do, and where it is."""
    file, options = golden_files("unclip_l")
    options = dict(options)
    width = read_statistics(options.pop("clip_stats"))[0].size
    where = "Give as clip_stats= the folder https://huggingface.co/sd2-community/.*/image_normalizer"
    for reason in ("none are published for width", "they cannot be fetched: sd2-community/.*no such repository"):
        with pytest.raises(CheckpointError, match=f"image encoder is OpenAI's, .*{reason}.*{where}") as caught:
            open_checkpoint(file, **options)
        assert "\n" not in str(caught.value)
        monkeypatch.setattr(statistics, "PUBLISHED_WIDTH", width)
