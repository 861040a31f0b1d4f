"""The readers on files built by hand, byte by byte: what they read, and what they refuse."""

import contextlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from convert import safetensors_file, tensor_file, torch_pickle, zip_directory
from convert.readers import CheckpointError, TensorInfo, load_pickle, open_tensors
from tests.convert.broken_files import VALID, edited, entry, refused, safetensors_bytes, survives
from tests.convert.hostile_pickles import HOSTILE
from tests.convert.torch_files import (
    ARRAY,
    ORDERED,
    edit,
    integer,
    mapping,
    name,
    numbers,
    several,
    storage,
    tensor,
    text,
    torch_bytes,
    torch_file,
    write,
    zip_bytes,
)

# --- .safetensors --------------------------------------------------------------------------------------------------


def test_safetensors_agrees_with_its_own_library(tmp_path):
    arrays = {
        "weights": ARRAY,
        "half": ARRAY.astype(np.float16),
        "ids": np.arange(-3, 3),
        "scalar": np.array(2.5),
        "none": np.empty((0, 5), np.float32),
        "flags": np.array([True, False]),
    }
    save_file(arrays, tmp_path / "a.safetensors", {"format": "np"})
    with open_tensors(tmp_path / "a.safetensors") as file:
        assert file.metadata == {"format": "np"}
        assert dict(file.tensors) == {name: TensorInfo(a.shape, a.dtype) for name, a in arrays.items()}
        for name, array in arrays.items():
            np.testing.assert_array_equal(file.read(name), array)
            assert file.read(name).shape == array.shape


@pytest.mark.parametrize("dtype", safetensors_file.DTYPES)
def test_safetensors_dtypes(tmp_path, dtype):
    want = np.array([0, 1, 1]).astype(safetensors_file.DTYPES[dtype])
    path = write(
        tmp_path / "a.safetensors", safetensors_bytes({"x": entry(dtype, (3,), (0, want.nbytes))}, want.tobytes())
    )
    with open_tensors(path) as file:
        got = file.read("x")
        assert got.dtype == want.dtype == file.tensors["x"].dtype
        assert got.tobytes() == want.tobytes()
        assert file.metadata == {}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (safetensors_bytes({"x": entry("F8_E4M3")}, bytes(8)), ["'x'", "'F8_E4M3'", "accepted: F64, F32"]),
        (safetensors_bytes({"x": entry("F32\n")}, bytes(8)), ["'x'", r"'F32\n'"]),
        (safetensors_bytes({"x": entry(shape=(3,))}, bytes(8)), ["'x'", "12 bytes", "8"]),
        (safetensors_bytes({"x": entry(shape=(2.0,))}, bytes(8)), ["'x'", "whole numbers"]),
        (safetensors_bytes({"x": entry(shape=(True, 2))}, bytes(8)), ["'x'", "whole numbers"]),
        (safetensors_bytes({"x": entry(shape=(-1, -2))}, bytes(8)), ["'x'", "whole numbers"]),
        (safetensors_bytes({"x": entry(shape=(10**30,))}, bytes(8)), ["'x'", "whole numbers"]),
        (safetensors_bytes({"x": entry(shape=[1] * 99)}, bytes(8)), ["'x'", "99 dimensions"]),
        (safetensors_bytes({"x": entry(shape=(0, 2**47, 2**47), offsets=(0, 0))}), ["'x'", "no array"]),
        (safetensors_bytes({"x": entry(offsets=(8, 0))}, bytes(8)), ["'x'", "in order"]),
        (safetensors_bytes({"x": entry(offsets=(0, 8, 9))}, bytes(8)), ["'x'", "data_offsets"]),
        (safetensors_bytes({"x": entry() | {"more": 1}}, bytes(8)), ["'x'", "nothing else"]),
        (safetensors_bytes({"x": 3}), ["'x'", "want dtype"]),
        (safetensors_bytes({"x": entry()}, bytes(7)), ["truncated", "'x'"]),
        (safetensors_bytes({"x": entry()}, bytes(9)), ["take 8 bytes", "9"]),
        (safetensors_bytes({"x": entry(offsets=(8, 16))}, bytes(16)), ["'x'", "gap or overlap"]),
        (safetensors_bytes({"x": entry(), "y": entry(offsets=(4, 12))}, bytes(12)), ["'y'", "gap or overlap"]),
        (safetensors_bytes({"x": entry(), "y": entry()}, bytes(8)), ["'y'", "gap or overlap"]),
        (safetensors_bytes(b'{"x": 1, "x": 1}'), ["'x'", "twice"]),
        (safetensors_bytes(b'{"x": {"shape": 1, "shape": 1}}'), ["'shape'", "twice"]),
        (safetensors_bytes({"__metadata__": {"a": 1}}), ["__metadata__", "strings"]),
        (safetensors_bytes({"__metadata__": []}), ["__metadata__", "strings"]),
        (safetensors_bytes(b'{"x": '), ["not valid JSON"]),
        (safetensors_bytes(b'{"\xff": 1}'), ["not valid JSON"]),
        (safetensors_bytes(b'{"x": ' + b"[" * 100_000), ["nested too deeply"]),
        (safetensors_bytes(b'{"x": ' + b"9" * 5000 + b"}"), ["not valid JSON"]),
        ((10**6).to_bytes(8, "little") + b"{}", ["truncated"]),
        ((2**24 + 1).to_bytes(8, "little") + b"{" + bytes(2**24), ["its header claims 16777217 bytes"]),
    ],
)
def test_safetensors_that_lie_are_refused(tmp_path, content, words):
    refused(write(tmp_path / "a.safetensors", content), *words)


def test_safetensors_header_must_be_an_object(tmp_path):
    refused(write(tmp_path / "a.safetensors", safetensors_bytes(b"[1]")), "neither")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        safetensors_file.open_safetensors(tmp_path / "a.safetensors")


# --- torch files ---------------------------------------------------------------------------------------------------


def test_zip_helper_agrees_with_zipfile():
    with zipfile.ZipFile(io.BytesIO(torch_bytes(mapping({"w": tensor()}), zip64=True))) as archive:
        assert archive.testzip() is None
        assert archive.read("a/data/0") == ARRAY.tobytes()


@pytest.mark.parametrize("zip64", [False, True])
def test_a_dict_of_tensors(tmp_path, zip64):
    code = mapping(
        {
            "plain": tensor(),
            "transposed": tensor(shape=(4, 3), strides=(1, 4)),
            "column": tensor(offset=1, shape=(3,), strides=(4,)),
            "last": tensor(offset=11, shape=(), strides=()),
            "expanded": tensor(shape=(2, 3), strides=(0, 1)),
            "empty": tensor(shape=(0, 7), strides=(7, 1)),
            "one": tensor(offset=3, shape=(1, 2), strides=(2**40, 4)),
            "old": tensor(function="torch._utils._rebuild_tensor"),
            "parameter": name("torch._utils._rebuild_parameter") + several(tensor(), b"\x88", ORDERED) + b"R",
        }
    )
    with open_tensors(torch_file(tmp_path / "a.pt", code, zip64=zip64)) as file:
        want = {
            "plain": ARRAY,
            "transposed": ARRAY.T,
            "column": ARRAY[:, 1],
            "last": ARRAY[2, 3],
            "expanded": np.broadcast_to(ARRAY[0, :3], (2, 3)),
            "empty": np.empty((0, 7), np.float32),
            "one": ARRAY.ravel()[None, [3, 7]],
            "old": ARRAY,
            "parameter": ARRAY,
        }
        assert list(file.tensors) == list(want)
        for key, array in want.items():
            got = file.read(key)
            np.testing.assert_array_equal(got, array, strict=True)
            assert got.flags.c_contiguous
            assert file.tensors[key] == TensorInfo(array.shape, np.dtype(np.float32))
        assert file.metadata == {}


@pytest.mark.parametrize("kind", torch_pickle.STORAGES)
def test_torch_dtypes(tmp_path, kind):
    want = np.array([0, 1, 1]).astype(torch_pickle.STORAGES[kind])
    code = mapping({"x": tensor(storage(kind=kind, size=3), shape=(3,), strides=(1,))})
    with open_tensors(torch_file(tmp_path / "a.pt", code, {"0": want.tobytes()})) as file:
        assert file.read("x").dtype == file.tensors["x"].dtype == want.dtype
        assert file.read("x").tobytes() == want.tobytes()


def test_what_lightning_leaves_beside_the_tensors_is_left_out(tmp_path):
    """Classes as keys, settings objects, sets, numpy scalars, an optimizer's state, the state dict's _metadata."""
    checkpoint = name("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    dtype = name("numpy.dtype") + several(text("f8"), b"\x89", b"\x88") + b"R" + several(integer(3)) + b"b"
    raw = name("_codecs.encode") + several(text("\x00"), text("latin1")) + b"R"
    code = mapping(
        {
            "epoch": integer(3),
            "loss": b"G" + struct.pack(">d", 0.5),
            "state_dict": mapping({"w": tensor(), "step": integer(4)}, ORDERED)
            + mapping({"_metadata": ORDERED})
            + b"b",
            "callbacks": b"}" + checkpoint + mapping({"best": tensor()}) + b"s",
            "hyper": name("omegaconf.dictconfig.DictConfig") + b")\x81" + mapping({"content": b"]"}) + b"b",
            "keyword": name("argparse.Namespace") + b")" + b"}" + b"\x92" + mapping({"a": b"N"}) + b"b",
            "list": name("omegaconf.listconfig.ListConfig") + b")\x81(" + integer(1) + b"e",
            "dict": name("pytorch_lightning.utilities.parsing.AttributeDict") + b")\x81" + text("a") + b"Ns",
            "sets": b"\x8f(" + integer(1) + b"\x90",
            "frozen": b"(" + integer(1) + b"\x91",
            "learnt": name("numpy.core.multiarray.scalar") + several(dtype, raw) + b"R",
            "optimizer": b"](" + mapping({"state": mapping({"exp_avg": tensor()})}) + b"e",
            "dtype": name("torch.bfloat16"),
            "single": b"]" + integer(1) + b"a",
            "thrown away": b"N" + b"N0" + b"(NN1",
        }
    )
    with open_tensors(torch_file(tmp_path / "a.ckpt", code)) as file:
        assert dict(file.tensors) == {"w": TensorInfo((3, 4), np.dtype(np.float32))}
    content = load_pickle(tmp_path / "a.ckpt")
    assert content["epoch"] == 3
    assert content["loss"] == 0.5
    assert content["single"] == [1]
    assert isinstance(content["state_dict"], OrderedDict)
    assert content["hyper"].name == "omegaconf.dictconfig.DictConfig"
    assert content["keyword"].name == "argparse.Namespace"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_that_torch_writes(tmp_path, protocol):
    class Held:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return None if not isinstance(value, Held) else ("storage", "FloatStorage", "0", "cpu", 12)

    # Python's own pickler around one storage, whose class is then named by hand.
    value = {"a": [1, -(2**40), 2.5, None, True], "b": (1, (2,), b"bytes", "text" * 100), "c": {}, "held": Held()}
    buffer = io.BytesIO()
    Pickler(buffer, protocol).dump(value)
    plain = text("FloatStorage") if protocol < 4 else b"\x8c\x0cFloatStorage"
    call = name("torch.FloatStorage") if protocol < 4 else b"\x8c\x05torch\x8c\x0cFloatStorage\x93"
    code = buffer.getvalue().replace(plain, call, 1)
    if protocol >= 4:  # the length of the frame, which nothing here depends on
        assert code[2:3] == b"\x95"
    path = write(tmp_path / "a.pt", zip_bytes({"a/data.pkl": code, "a/data/0": ARRAY.tobytes()}))
    content = load_pickle(path)
    assert (content["held"].key, content["held"].size) == ("0", 12)
    assert content["a"] == value["a"]
    assert content["c"] == {}
    assert content["b"][3] == value["b"][3]


def test_load_pickle_gives_arrays_that_outlive_the_file(tmp_path):
    path = torch_file(tmp_path / "a.th", several(tensor(), tensor(shape=(4, 3), strides=(1, 4))))
    first, second = load_pickle(path)
    np.testing.assert_array_equal(first, ARRAY)
    np.testing.assert_array_equal(second, ARRAY.T)
    assert not first.flags.writeable
    refused(path, "no tensors by name")


def test_a_file_without_checksums_is_read(tmp_path):
    """torch.serialization.set_crc32_options(False) writes zeros for them."""
    path = torch_file(tmp_path / "a.pt", mapping({"w": tensor()}), change=lambda es: [e | {"crc": 0} for e in es])
    with open_tensors(path) as file:
        np.testing.assert_array_equal(file.read("w"), ARRAY)


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickles_are_refused(tmp_path, case):
    code, words = HOSTILE[case]
    path = torch_file(tmp_path / "a.ckpt", code)
    refused(path, *words)
    refused(path, *words, opener=load_pickle)


@pytest.mark.parametrize(
    ("view", "words"),
    [
        ({"shape": (3, 5)}, ["'w'", "outside its storage"]),
        ({"offset": 1}, ["'w'", "outside its storage"]),
        ({"offset": 13, "shape": (), "strides": ()}, ["'w'", "outside its storage"]),
        ({"strides": (5, 1)}, ["'w'", "outside its storage"]),
        ({"shape": (2**40,), "strides": (0,)}, ["'w'", "without measure"]),
        ({"shape": (2**30, 2**30), "strides": (0, 0)}, ["'w'", "no array"]),
        ({"shape": (1,) * 40, "strides": (1,) * 40}, ["'w'", "40 dimensions"]),
        ({"shape": (0, 2**40, 2**40), "strides": (0, 0, 0)}, ["'w'", "no array"]),
    ],
)
def test_views_beyond_their_storage_are_refused(tmp_path, view, words):
    path = torch_file(tmp_path / "a.pt", mapping({"w": tensor(**view)}))
    refused(path, *words)
    refused(path, words[-1], opener=load_pickle)


@pytest.mark.parametrize(
    "code",
    [
        mapping({"n": integer(3)}),
        b"]",
        b"N",
        tensor(),
        storage(),
        mapping({"state_dict": mapping({"n": b"N"}), "w": tensor()}),
        mapping({"w": name("torch.Size")}),
        mapping({"w": storage()}),
        b"}" + integer(1) + tensor() + b"s",
    ],
)
def test_no_tensors_by_name(tmp_path, code):
    refused(torch_file(tmp_path / "a.pt", code), "no tensors by name")


@pytest.mark.parametrize(
    "code",
    [
        b"]" * 100_000 + b"a" * 99_999,
        b"(" * 100_000 + b"t" * 100_000,
        b"N" + b"\x85" * 100_000,
        b"}" + (text("a") + b"}") * 100_000 + b"s" * 100_000,
        # Each tuple holds the one before twice: 2 ** 1000 items to whoever walks over it.
        b")" + b"".join(b"q" + bytes([i % 256]) + b"h" + bytes([i % 256]) + b"\x86" for i in range(1000)),
        b"]q\0h\0a",  # a list in itself
        b"".join(b"r" + i.to_bytes(4, "little") for i in range(1000)).join([b"N", b""]),
        b"N" + b"r\xff\xff\xff\x7f",  # a memo index that no list could have
    ],
)
def test_deep_shared_and_circular_pickles_are_harmless(tmp_path, code):
    began = time.process_time()
    with open_tensors(torch_file(tmp_path / "a.pt", mapping({"w": tensor(), "trap": code}))) as file:
        np.testing.assert_array_equal(file.read("w"), ARRAY)
    assert time.process_time() - began < 10
    load_pickle(tmp_path / "a.pt")


def test_a_pickle_without_its_end_is_refused(tmp_path):
    refused(write(tmp_path / "a.pt", zip_bytes({"a/data.pkl": b"\x80\2" + mapping({"w": b"N"})})), "pickle is damaged")


def test_the_number_of_operations_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_pickle, "OPCODE_LIMIT", 1000)
    refused(torch_file(tmp_path / "a.pt", b"N0" * 1000 + b"}"), "more than 1000 operations")
    monkeypatch.setattr(torch_pickle, "PICKLE_LIMIT", 100)
    refused(torch_file(tmp_path / "a.pt", b"N0" * 100 + b"}"), "pickle has 204 bytes")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (edit(0, crc=1), ["its pickle is damaged", "checksum"]),
        (edit(1, crc=1), ["'byteorder' is damaged"]),
        (edit(2, method=8), ["'a/data/0' is compressed"]),
        (edit(2, flags=0x809), ["'a/data/0' is compressed or encrypted"]),
        (edit(2, size=2**31), ["'a/data/0' is compressed"]),
        (edit(2, size=2**31, packed=2**31), ["'a/data/0' overlaps"]),
        (edit(2, at=0), ["'a/data/0'", "header is damaged"]),
        (edit(2, at=0, name=b"a/data.pkl"), ["'a/data.pkl' is there twice"]),
        (edit(2, at=2**31), ["header lies outside"]),
        (edit(2, local=b"a/data/1"), ["'a/data/0'", "header is damaged"]),
        (edit(3, name=b"a/../../x", local=b"a/../../x"), ["'a/../../x'", "plain relative name"]),
        (edit(3, name=b"/etc/x", local=b"/etc/x"), ["'/etc/x'", "plain relative name"]),
        (edit(3, name=b"a\\x", local=b"a\\x"), [r"'a\\x'", "plain relative name"]),
        (edit(3, name=b"a/x\0", local=b"a/x\0"), [r"'a/x\x00'", "plain relative name"]),
        (edit(3, name=b"\xff", local=b"\xff"), ["not a name in UTF-8"]),
        (edit(3, name=b"a/constants.pkl", local=b"a/constants.pkl"), ["TorchScript", "state_dict()"]),
        (edit(3, name=b"b/data.pkl", local=b"b/data.pkl"), ["2 records named */data.pkl"]),
        (edit(0, name=b"a/b/data.pkl", local=b"a/b/data.pkl"), ["0 records named */data.pkl"]),
        (edit(1, data=b"big\0\0\0", crc=0), ["byte order"]),
        (lambda entries: [*entries, entries[0]], ["'a/data.pkl' is there twice"]),
        (edit(2, data=b""), ["'a/data/0' overlaps"]),
    ],
)
def test_zip_files_that_lie_are_refused(tmp_path, change, words):
    refused(torch_file(tmp_path / "a.pt", mapping({"w": tensor()}), change=change), *words)


def test_other_spellings_of_a_zip_file(tmp_path):
    """Folder entries and names without the UTF-8 flag are fine; a comment that lies about its length is not."""
    records = {"a/": b"", "a/data.pkl": b"\x80\2" + mapping({"w": tensor()}) + b".", "a/data/0": ARRAY.tobytes()}
    content = zip_bytes(records, change=lambda es: [e | {"flags": 0} for e in es], comment=b"note")
    with open_tensors(write(tmp_path / "a.pt", content)) as file:
        assert list(file.tensors) == ["w"]
    refused(write(tmp_path / "a.pt", content[:-1]), "where it should be")
    refused(write(tmp_path / "a.pt", content + b"more"), "where it should be")


def test_directories_that_lie_are_refused(tmp_path, monkeypatch):
    content = torch_bytes(mapping({"w": tensor()}))
    refused(write(tmp_path / "a.pt", content[:-30]), "truncated zip file")
    refused(write(tmp_path / "a.pt", content.replace(b"PK\1\2", b"PK\1\3", 1)), "what it should be")
    for at, number in ((8, 3), (8, 0)):  # fewer entries than the directory holds
        raw = bytearray(content)
        raw[len(raw) - 22 + at + 2] = number
        refused(write(tmp_path / "a.pt", bytes(raw)), "what it should be")
    raw = bytearray(content)
    raw[len(raw) - 22 + 10] = 200
    refused(write(tmp_path / "a.pt", bytes(raw)), "damaged zip file")
    wide = torch_bytes(mapping({"w": tensor()}), zip64=True)
    refused(write(tmp_path / "a.pt", wide.replace(b"PK\6\6", b"PK\6\5")), "what it should be")
    refused(write(tmp_path / "a.pt", wide.replace(b"\1\0\x18\0", b"\2\0\x18\0", 1)), "64-bit size is missing")
    refused(write(tmp_path / "a.pt", wide.replace(b"\1\0\x18\0", b"\1\0\x15\0", 1)), "64-bit size is missing")
    monkeypatch.setattr(zip_directory, "RECORD_LIMIT", 3)
    refused(write(tmp_path / "a.pt", content), "4 records")


def test_damaged_data_is_found_when_it_is_read(tmp_path):
    path = torch_file(
        tmp_path / "a.pt", mapping({"w": tensor(), "v": tensor(storage(key="1"))}), {"0": bytes(48), "1": bytes(48)}
    )
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"a/data/1") + 20] ^= 1
    with open_tensors(write(path, bytes(raw))) as file:
        assert not file.read("w").any()
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"a\.pt: the data of 'v' is damaged"):
                file.read("v")
    refused(path, "record '1'", "damaged", opener=load_pickle)


# --- indexes -------------------------------------------------------------------------------------------------------


def sharded(folder, places, **shards):
    for shard, arrays in shards.items():
        save_file(arrays, folder / f"{shard}.safetensors")
    return write(
        folder / "model.safetensors.index.json",
        json.dumps({"metadata": {"total_size": 1}, "weight_map": places}).encode(),
    )


def test_an_index_gathers_its_shards(tmp_path):
    torch_file(tmp_path / "two.bin", mapping({"b": tensor()}))
    with open_tensors(sharded(tmp_path, {"a": "one.safetensors", "b": "two.bin"}, one={"a": ARRAY + 1})) as file:
        assert list(file.tensors) == ["a", "b"]
        np.testing.assert_array_equal(file.read("a"), ARRAY + 1)
        np.testing.assert_array_equal(file.read("b"), ARRAY)


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ({"a": "one.safetensors", "b": "two.safetensors"}, ["'two.safetensors' is missing"]),
        ({"a": "one.safetensors", "b": "one.safetensors"}, ["'b' is not in 'one.safetensors'"]),
        ({"b": "one.safetensors"}, ["'b' is not in"]),
        ({"a": "../one.safetensors"}, ["'a'", "'../one.safetensors'", "beside the index"]),
        ({"a": "/etc/passwd"}, ["'/etc/passwd'"]),
        ({"a": "sub\\one.safetensors"}, ["beside the index"]),
        ({"a": "one\0"}, ["beside the index"]),
        ({"a": ".."}, ["beside the index"]),
        ({"a": ""}, ["beside the index"]),
        ({"a": "\ud800"}, ["is missing"]),
        ({"a": "x" * 5000}, ["beside the index", "…"]),
        ({"a": "😀" * 200}, ["cannot be read"]),
        ({"a": 3}, ["a int"]),
        ({"a": [[]]}, ["a list"]),
        ({}, ["weight_map"]),
        ([], ["weight_map"]),
        ({"a": "model.safetensors.index.json"}, ["is an index itself"]),
        ({"a": "text.bin"}, ["text.bin", "neither"]),
        ({"a": "folder"}, ["folder", "not a file"]),
    ],
)
def test_indexes_that_lie_are_refused(tmp_path, places, words):
    (tmp_path / "folder").mkdir()
    write(tmp_path / "text.bin", b"text")
    refused(sharded(tmp_path, places, one={"a": ARRAY}), *words)


def test_a_tensor_that_the_index_does_not_place_is_refused(tmp_path):
    index = sharded(
        tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}, one={"a": ARRAY, "b": ARRAY}, two={"b": ARRAY}
    )
    refused(index, "'one.safetensors' holds 'b'")


def test_broken_indexes_are_refused(tmp_path):
    refused(write(tmp_path / "a.json", b'{"weight_map": {"a": "x", "a": "y"}}'), "'a' is there twice")
    refused(write(tmp_path / "a.json", b'{"weight_map": '), "not valid JSON")
    refused(write(tmp_path / "a.json", b'{"a": "' + b" " * 2**24 + b'"}'), "bytes of JSON")


# --- any file ------------------------------------------------------------------------------------------------------


def tar_bytes():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["is empty"]),
        (b"x", ["neither"]),
        (np.random.default_rng(0).bytes(5000), ["neither"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", ["git-lfs pointer", "git lfs pull"]),
        (b"\n<!DOCTYPE html>\n<html><body>404</body></html>", ["web page"]),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', ["web page"]),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", ["old form", "1.6", "torch.save"]),
        (pickle.dumps({"w": [1.0]}), ["bare pickle"]),
        (tar_bytes(), ["tar file"]),
        (b"PK\5\6" + bytes(18), ["0 records named"]),
        (b"PK\3\4" + bytes(100), ["truncated zip"]),
        (b'{"error": "not found"}', ["no index"]),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, content, words):
    path = write(tmp_path / "model.ckpt", content)
    refused(path, *words)
    refused(path, opener=load_pickle)


def test_load_pickle_wants_a_torch_file(tmp_path):
    refused(write(tmp_path / "a", safetensors_bytes({})), "want a torch file", opener=load_pickle)


@pytest.mark.parametrize("opener", [open_tensors, load_pickle])
def test_a_missing_file_is_told(tmp_path, opener):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*nothing\.ckpt"):
        opener(tmp_path / "nothing.ckpt")
    refused(tmp_path / "..", "not a file", opener=opener)
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "not a file", opener=opener)


def test_files_that_cannot_be_opened_or_mapped(tmp_path, monkeypatch):
    path = write(tmp_path / "a.safetensors", safetensors_bytes({}))

    def fail(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail)
        refused(path, "cannot be read (Permission denied)")
    monkeypatch.setattr(tensor_file.mmap, "mmap", fail)
    refused(path, "cannot be mapped", "Permission denied")


def open_handles():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts the handles that Linux lists")
def test_nothing_stays_open(tmp_path):
    save_file({"a": ARRAY}, tmp_path / "a.safetensors")
    torch_file(tmp_path / "a.pt", mapping({"a": tensor()}))
    index = sharded(tmp_path, {"a": "a.safetensors"})
    before = open_handles()
    for path in (tmp_path / "a.safetensors", tmp_path / "a.pt", index):
        with open_tensors(path) as file:
            file.read("a")
            assert open_handles() > before
        assert open_handles() == before
        with open_tensors(path) as file:
            kept = file.read("a")
        np.testing.assert_array_equal(kept, ARRAY)  # the array holds on to the file
        del kept
        assert open_handles() == before
        with contextlib.suppress(CheckpointError):
            open_tensors(write(tmp_path / "cut", path.read_bytes()[:-1]))
        assert open_handles() == before
    load_pickle(tmp_path / "a.pt")
    assert open_handles() == before


def test_reading_what_is_not_there(tmp_path):
    save_file({"a": ARRAY}, tmp_path / "a.safetensors")
    with open_tensors(tmp_path / "a.safetensors") as file, pytest.raises(ValueError, match="no tensor 'b'"):
        file.read("b")
    with pytest.raises(ValueError, match="'a' is read from a checkpoint that is closed"):
        file.read("a")


def test_tensors_are_views_of_the_file(tmp_path):
    """A sparse file of 3 GiB: what is read costs no memory of our own."""
    size = 3 * 2**30
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write(safetensors_bytes({"w": entry("F16", (size // 2,), (0, size))}))
        file.truncate(file.tell() + size)
    tracemalloc.start()
    try:
        with open_tensors(path) as opened:
            array = opened.read("w")
            assert array.nbytes == size
            assert not array.flags.writeable
            assert array[-1] == 0
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_bfloat16_values(tmp_path):
    want = np.array([1, -2.5, 3e38, np.inf], ml_dtypes.bfloat16)
    code = mapping({"x": tensor(storage(kind="torch.BFloat16Storage", size=4), shape=(4,), strides=(1,))})
    with open_tensors(torch_file(tmp_path / "a.pt", code, {"0": want.tobytes()})) as file:
        np.testing.assert_array_equal(file.read("x").astype(np.float32), want.astype(np.float32))


# --- fuzzing -------------------------------------------------------------------------------------------------------

PICKLE = mapping(
    {"w": tensor(), "v": b"](" + name("argparse.Namespace") + b")\x81q\1h\1e", "u": several(tensor(), b"N")}
)
EDITS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4)
FUZZ = settings(max_examples=400, deadline=None, derandomize=True, database=None)


@FUZZ
@given(st.binary(max_size=600), st.sampled_from([b"", b"PK\3\4", b"\x30\0\0\0\0\0\0\0{", b"{", b"\x80\2", b"<"]))
@example(b"", b"")
def test_random_bytes_raise_nothing_but_a_refusal(content, start):
    survives(start + content, ".ckpt")


@FUZZ
@given(st.sampled_from(sorted(VALID)), EDITS)
def test_files_with_changed_bytes(which, edits):
    survives(edited(VALID[which], edits), which)


@FUZZ
@given(st.sampled_from(sorted(VALID)), st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
def test_files_with_a_piece_missing(which, start, stop):
    content = VALID[which]
    first, last = sorted((int(start * len(content)), int(stop * len(content))))
    survives(content[:first], which)
    survives(content[:first] + content[last:], which)


@FUZZ
@given(EDITS)
def test_pickles_with_changed_bytes_and_a_right_checksum(edits):
    survives(torch_bytes(edited(PICKLE, edits)), ".pt")


OPERATIONS = [
    *(bytes([i]) for i in range(256)),
    *(b"(", b"t", b"u", b"e", b"R", b"b", b"\x81", b"Q", b"}", b"]", b")", b"N", b"q\0", b"h\0") * 8,
    *(text("w"), integer(0), integer(12), storage(), tensor(), numbers([3, 4]), ORDERED) * 16,
    *map(name, sorted(torch_pickle.UNDERSTOOD)),
    *map(name, sorted(torch_pickle.INERT)),
]


@FUZZ
@given(st.lists(st.sampled_from(OPERATIONS), max_size=60).map(b"".join))
def test_random_pickles_raise_nothing_but_a_refusal(code):
    survives(torch_bytes(code), ".pt")
    survives(torch_bytes(mapping({"w": tensor(), "v": code})), ".pt")


@FUZZ
@given(
    st.dictionaries(
        st.text(max_size=3),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from([*safetensors_file.DTYPES, "F8_E5M2", 3]),
                "shape": st.lists(st.integers(-1, 5), max_size=3),
                "data_offsets": st.lists(st.integers(-1, 48), min_size=1, max_size=3),
            }
        )
        | st.recursive(
            st.none() | st.integers() | st.text(max_size=2), lambda s: st.lists(s, max_size=2), max_leaves=4
        ),
        max_size=3,
    )
)
def test_random_headers_raise_nothing_but_a_refusal(header):
    survives(safetensors_bytes(header, bytes(48)), ".safetensors")


def test_reading_imports_no_torch():
    code = "import sys, convert.readers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
