"""The readers on files that torch and the Hugging Face libraries write."""

import argparse
import collections
import json
import os
import pathlib
import sys
import types

import numpy as np
import pytest
import torch
from huggingface_hub import save_torch_state_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from convert.readers import CheckpointError, load_pickle, open_tensors

pytestmark = pytest.mark.parity

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def values(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 3).to(dtype)


def check(path, want):
    """The file holds exactly these tensors: names, shapes, dtypes, every bit."""
    with open_tensors(path) as file:
        assert sorted(file.tensors) == sorted(want)
        for name, tensor in want.items():
            got, info = file.read(name), file.tensors[name]
            flat = tensor.detach().flatten().clone(memory_format=torch.contiguous_format)
            assert info.shape == got.shape == tuple(tensor.shape)
            assert str(info.dtype) == str(got.dtype) == str(tensor.dtype).removeprefix("torch.")
            assert got.flags.c_contiguous
            assert got.tobytes() == flat.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(tmp_path, dtype):
    state = {"matrix": values(5, 7, dtype=dtype), "scalar": values(dtype=dtype), "none": values(0, 3, dtype=dtype)}
    torch.save(state, tmp_path / "a.pt")
    check(tmp_path / "a.pt", state)
    save_file(state, tmp_path / "a.safetensors")
    check(tmp_path / "a.safetensors", state)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_protocols(tmp_path, protocol):
    state = {"w": values(3, 4), "p": torch.nn.Parameter(values(2))}
    torch.save(state, tmp_path / "a.pt", pickle_protocol=protocol)
    check(tmp_path / "a.pt", state)


def test_views_and_shared_storages(tmp_path):
    base = values(4, 6, 5)
    state = {
        "base": base,
        "same": base,
        "permuted": base.permute(2, 0, 1),
        "sliced": base[1:3, ::2, 1:],
        "diagonal": base[0].diagonal(),
        "expanded": values(3, 1).expand(3, 8),
        "channels_last": values(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "one": base[:, :1, :1].transpose(1, 2),
        "flipped_sign": -values(3),
        "ids": torch.arange(77).expand(1, -1),
    }
    torch.save(state, tmp_path / "a.pt")
    check(tmp_path / "a.pt", state)
    arrays = load_pickle(tmp_path / "a.pt")
    for name, tensor in state.items():
        np.testing.assert_array_equal(arrays[name], tensor.numpy(), strict=True)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_view(tmp_path_factory, data):
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    view = values(*sizes).permute(data.draw(st.permutations(range(len(sizes)))))
    for axis, size in enumerate(view.shape):
        start, step = data.draw(st.integers(0, size)), data.draw(st.integers(1, 3))
        view = view[(slice(None),) * axis + (slice(start, None, step),)]
    path = tmp_path_factory.mktemp("view") / "a.pt"
    torch.save({"w": view}, path)
    check(path, {"w": view})


def test_module_state_dicts_and_parameters(tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2)).half()
    state = module.state_dict()
    assert state._metadata
    torch.save(state, tmp_path / "a.pth")
    check(tmp_path / "a.pth", state)
    parameters = dict(module.named_parameters())
    parameters["0.weight"].note = "kept by torch in a state of its own"
    torch.save(parameters, tmp_path / "b.pth")
    check(tmp_path / "b.pth", parameters)


@pytest.fixture
def lightning(monkeypatch):
    """Stand-ins, by name, for the classes of Lightning and omegaconf that its checkpoints mention."""

    def stand_in(module, name, *bases):
        made = type(name, bases, {"__module__": module})
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            dotted = ".".join(parts[:end])
            monkeypatch.setitem(sys.modules, dotted, sys.modules.get(dotted) or types.ModuleType(dotted))
        setattr(sys.modules[module], name, made)
        return made

    return stand_in


@pytest.mark.parametrize("protocol", [2, 4])
def test_lightning_checkpoints(tmp_path, lightning, protocol):
    module = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(module.parameters())
    module(values(2, 4)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 5])  # keeps its milestones in a Counter
    callback = lightning("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    settings = lightning("omegaconf.dictconfig", "DictConfig")()
    settings.__dict__["_content"] = {"width": 4, "ref_type": dict, "root": pathlib.PosixPath("/x")}
    attributes = lightning("pytorch_lightning.utilities.parsing", "AttributeDict", dict)(learning_rate=1e-4)
    state = module.state_dict()
    content = {
        "epoch": 3,
        "global_step": 470_000,
        "pytorch-lightning_version": "1.7.7",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_loop.batch_progress": {"total": {"ready": 1}}}},
        "callbacks": {callback: {"best_model_score": torch.tensor(0.5), "dirpath": "/x"}, "EMA": None},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [schedule.state_dict()],
        "hparams_name": "kwargs",
        "hyper_parameters": attributes,
        "config": settings,
        "arguments": argparse.Namespace(seed=1, betas=(0.9, 0.99)),
        "counts": collections.defaultdict(int, a=1),
        "numpy": [np.float64(0.5), np.arange(3), np.int64(4), np.dtype("f4")],
        "random": [torch.get_rng_state(), np.random.default_rng(0).bit_generator.state],
        "odd": [{1, 2}, frozenset({3}), b"", b"bytes", 1j, bytearray(b"x"), slice(1), torch.Size([2]), 2**100],
        "torch": [torch.float16, torch.device("cuda", 0)],
    }
    torch.save(content, tmp_path / "a.ckpt", pickle_protocol=protocol)
    check(tmp_path / "a.ckpt", state)
    read = load_pickle(tmp_path / "a.ckpt")
    assert read["global_step"] == 470_000
    assert read["arguments"].name == "argparse.Namespace"
    np.testing.assert_array_equal(read["random"][0], torch.get_rng_state().numpy())
    np.testing.assert_array_equal(
        read["optimizer_states"][0]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"].numpy()
    )


def test_statistics_are_a_pair(tmp_path):
    mean, std = values(768), values(768, seed=1).abs()
    torch.save((mean, std), tmp_path / "ViT-L-14_stats.th")
    content = load_pickle(tmp_path / "ViT-L-14_stats.th")
    assert isinstance(content, tuple)
    for got, want in zip(content, (mean, std), strict=True):
        np.testing.assert_array_equal(got, want.numpy(), strict=True)


def test_without_checksums(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": values(9)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    check(tmp_path / "a.pt", {"w": values(9)})


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile-was-run",)


def legacy(path):
    torch.save({"w": values(2)}, path, _use_new_zipfile_serialization=False)


def script(path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)


@pytest.mark.parametrize(
    ("save", "words"),
    [
        (lambda path: torch.save({"w": values(2), "x": Hostile()}, path), ["system", "nothing was run"]),
        (lambda path: torch.save(torch.nn.Linear(2, 2), path), ["torch.nn.modules.linear.Linear"]),
        (lambda path: torch.save({"w": values(2).to(torch.float8_e4m3fn)}, path), ["torch.float8_e4m3fn", "bfloat16"]),
        (lambda path: torch.save({"w": torch.ones(2, dtype=torch.uint16)}, path), ["torch.uint16"]),
        (lambda path: torch.save({"w": torch.ones(2, dtype=torch.complex64)}, path), ["ComplexFloatStorage"]),
        (lambda path: torch.save({"w": torch.eye(2).to_sparse()}, path), ["_rebuild_sparse_tensor"]),
        (lambda path: torch.save({"w": torch.ones(2, device="meta")}, path), ["_rebuild_meta_tensor_no_storage"]),
        (lambda path: torch.save([values(2)], path), ["no tensors by name"]),
        (legacy, ["old form", "torch.save"]),
        (script, ["TorchScript", "state_dict()"]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_files_that_are_refused(tmp_path, monkeypatch, save, words):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError) as caught:
        open_tensors(tmp_path / "a.ckpt")
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)
    assert os.listdir() == ["a.ckpt"]


@pytest.mark.parametrize("safe", [True, False])
def test_shards_of_hugging_face(tmp_path, safe):
    state = {f"layer.{i}.weight": values(40, 40, seed=i) for i in range(6)}
    save_torch_state_dict(state, tmp_path, max_shard_size=15_000, safe_serialization=safe)
    (index,) = tmp_path.glob("*.index.json")
    assert len(set(json.loads(index.read_text())["weight_map"].values())) > 2
    check(index, state)
