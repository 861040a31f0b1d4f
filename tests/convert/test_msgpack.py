"""Flax's msgpack files, by Flax's own serialization and built by hand: what is read of them, and what is refused."""

import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from flax import serialization
from hypothesis import given
from hypothesis import strategies as st

from convert import msgpack_file
from convert.readers import TensorInfo, load_pickle, open_tensors, recognise
from tests.convert.test_readers import ARRAY, edited, refused, survives, write

HALF = np.array([1, -2.5, 3e38, np.inf], ml_dtypes.bfloat16)


def read(path):
    """Every tensor; its shape and dtype are those promised."""
    with open_tensors(path) as file:
        arrays = {name: file.read(name) for name in file.tensors}
        assert dict(file.tensors) == {name: TensorInfo(a.shape, a.dtype) for name, a in arrays.items()}
    return arrays


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].tobytes() == array.tobytes()
        assert (got[name].shape, got[name].dtype) == (array.shape, array.dtype)


def test_it_agrees_with_flax(tmp_path):
    tree = {
        "conv_in": {"kernel": np.arange(54, dtype=np.float32).reshape(3, 3, 2, 3), "bias": HALF},
        "layers": {"0": {"scale": ARRAY.T}, "1": {"scale": ARRAY.astype(np.float16)}},
        "empty": np.empty((0, 5), np.float32),
        "scalar": np.array(2.5),
        "number": np.float32(0.5),
        "nothing": {},
        "ids": np.arange(-3, 300),
        "x" * 40: {"y" * 300: np.array([True, False])},
    }
    want = {
        "conv_in.kernel": tree["conv_in"]["kernel"],
        "conv_in.bias": HALF,
        "layers.0.scale": np.ascontiguousarray(ARRAY.T),
        "layers.1.scale": ARRAY.astype(np.float16),
        **{name: tree[name] for name in ("empty", "scalar", "ids")},
        "number": np.array(0.5, np.float32),
        f"{'x' * 40}.{'y' * 300}": np.array([True, False]),
    }
    assert_equal(read(write(tmp_path / "a.msgpack", serialization.to_bytes(tree))), want)


@pytest.mark.parametrize("dtype", msgpack_file.DTYPE_NAMES)
def test_dtypes(tmp_path, dtype):
    want = np.array([0, 1, 1]).astype(msgpack_file.DTYPE_NAMES[dtype])
    assert_equal(read(write(tmp_path / "a", serialization.to_bytes({"x": want}))), {"x": want})


TREES = st.recursive(
    st.builds(
        lambda shape, dtype: np.arange(np.prod(shape)).reshape(shape).astype(dtype),
        st.lists(st.integers(0, 4), max_size=4),
        st.sampled_from([np.float32, np.int8, ml_dtypes.bfloat16]),
    ),
    lambda leaves: st.dictionaries(st.text("ab_0", min_size=1, max_size=40), leaves, max_size=20),
    max_leaves=30,
)


@given(st.dictionaries(st.text("cde", min_size=1, max_size=3), TREES, min_size=1, max_size=20))
def test_any_tree(tmp_path_factory, tree):
    def leaves(value, path):
        for key, leaf in value.items():
            if isinstance(leaf, dict):
                yield from leaves(leaf, (*path, key))
            else:
                yield ".".join((*path, key)), leaf

    path = tmp_path_factory.mktemp("tree") / "a.msgpack"
    assert_equal(read(write(path, serialization.to_bytes(tree))), dict(leaves(tree, ())))


def test_arrays_in_pieces(tmp_path, monkeypatch):
    """Above 1 GiB Flax writes an array in several; here above 20 bytes."""
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 20)
    tree = {"a": {"w": ARRAY, "v": HALF}, "large": np.arange(60, dtype=np.int8).reshape(3, 4, 5)}
    content = serialization.to_bytes(tree)
    assert content.count(b"chunks") == 2
    assert_equal(
        read(write(tmp_path / "a.msgpack", content)), {"a.w": ARRAY, "a.v": HALF, "large": np.asarray(tree["large"])}
    )


def test_shards(tmp_path):
    """As transformers writes them: names with slashes, as the keys of each shard's one map and in the index."""
    shards = {"one.msgpack": {"text_model/layers/0/kernel": ARRAY}, "two.msgpack": {"text_model/bias": HALF}}
    for name, arrays in shards.items():
        write(tmp_path / name, serialization.to_bytes(arrays))
    places = {name: shard for shard, arrays in shards.items() for name in arrays}
    index = write(tmp_path / "flax_model.msgpack.index.json", json.dumps({"weight_map": places}).encode())
    assert_equal(read(index), {"text_model.layers.0.kernel": ARRAY, "text_model.bias": HALF})
    places["text_model/scale"] = "two.msgpack"
    refused(write(index, json.dumps({"weight_map": places}).encode()), "'text_model.scale' is not in 'two.msgpack'")


def test_it_is_told_by_its_content(tmp_path):
    for size in (1, 15, 16, 70_000):
        content = serialization.to_bytes({f"{i:05}": {} for i in range(size)})
        assert recognise(write(tmp_path / "model.ckpt", content)) == "msgpack"
    refused(write(tmp_path / "a.msgpack", b"\x80"), "neither")
    refused(write(tmp_path / "a.msgpack", b"\x81\x01\x02"), "neither")
    refused(write(tmp_path / "a.msgpack", serialization.to_bytes(ARRAY)), "neither")
    refused(write(tmp_path / "a", serialization.to_bytes({"w": ARRAY})), "want a torch file", opener=load_pickle)


# --- files built by hand -------------------------------------------------------------------------------------------


def text(value):
    return b"\xd9" + bytes([len(value)]) + value.encode()


def items(**entries):
    return bytes([0x80 + len(entries)]) + b"".join(text(name) + value for name, value in entries.items())


def numbers(*values):
    return bytes([0x90 + len(values)]) + b"".join(b"\xcf" + value.to_bytes(8, "big") for value in values)


SHAPE, FLOAT32 = numbers(2), text("float32")


def array(shape=SHAPE, dtype=FLOAT32, data=b"\xc4\x08" + bytes(8), *, start=b"\x93", kind=1, size=None):
    content = start + shape + dtype + data
    return b"\xc9" + (len(content) if size is None else size).to_bytes(4, "big") + bytes([kind]) + content


def pieces(shape=None, chunks=None, mark=b"\xc3", **more):
    shape = items(**{"0": b"\x04"}) if shape is None else shape
    chunks = items(**{"0": array(), "1": array()}) if chunks is None else chunks
    return items(__msgpack_chunked_array__=mark, shape=shape, chunks=chunks, **more)


GOOD = {
    "lengths of another size": array(b"\xdc\0\1\xcc\2", b"\xda\0\7float32", b"\xc6\0\0\0\x08" + bytes(8)),
    "an extension of fixed size": b"\xd8\3\x93\x90\xa7float32\xc4\4" + bytes(4),
    "pieces in another order": items(
        chunks=items(**{"1": array(), "0": array()}), __msgpack_chunked_array__=b"\xc3", shape=items(**{"0": b"\4"})
    ),
}
BROKEN = {
    "nothing else": (b"\x81\xa1", ["truncated", "2 bytes"]),
    "a number": (items(x=b"\x05"), ["'x' is 5", "want an array"]),
    "a mark": (items(x=b"\xc3"), ["'x' is True"]),
    "null": (items(x=b"\xc0"), ["'x' is a null", "want an array"]),
    "a negative number": (items(x=b"\xff"), ["'x' is a signed integer"]),
    "a float": (items(x=b"\xcb" + bytes(8)), ["'x' is a float"]),
    "a string": (items(x=text("y")), ["'x' is a string"]),
    "bytes": (items(x=b"\xc4\0"), ["'x' is a bytes"]),
    "a list": (items(x=b"\x91\x01"), ["'x' is a list"]),
    "a byte that msgpack never uses": (items(x=b"\xc1"), ["'x'"]),
    "a complex number": (items(x=array(kind=2)), ["'x'", "type 2"]),
    "an extension that is not Flax's": (items(x=array(kind=255)), ["'x'", "type 255"]),
    "no list": (items(x=array(start=b"\x83")), ["'x'", "a list of shape"]),
    "a list of two": (items(x=array(start=b"\x92")), ["'x'", "a list of shape"]),
    "a shape that is a number": (items(x=array(b"\x02")), ["'x'", "as its shape"]),
    "a negative size": (items(x=array(b"\x91\xff")), ["'x'", "whole numbers"]),
    "a size of a string": (items(x=array(b"\x91" + text("2"))), ["'x'", "whole numbers"]),
    "a size without end": (items(x=array(numbers(2**63))), ["'x'", "whole numbers"]),
    "too many dimensions": (items(x=array(b"\xdc\0\x40" + b"\1" * 64)), ["'x'", "up to 32 whole numbers"]),
    "a shape of four billion": (items(x=array(b"\xdd\xff\xff\xff\xff")), ["'x'", "whole numbers"]),
    "sizes that no array has": (items(x=array(numbers(0, 2**47, 2**47), data=b"\xc4\0")), ["'x'", "no array"]),
    "a dtype": (items(x=array(dtype=text("float8_e4m3fn"))), ["'x'", "'float8_e4m3fn'", "accepted: float64, float32"]),
    "an object": (items(x=array(dtype=text("object"))), ["'x'", "'object'"]),
    "a dtype that is a number": (items(x=array(dtype=b"\4")), ["'x'", "want a string", "integer"]),
    "a dtype of another script": (items(x=array(dtype=b"\xa1\xff")), ["'x'", "UTF-8"]),
    "too little data": (items(x=array(data=b"\xc4\7" + bytes(7))), ["'x'", "takes 8 bytes", "it has 7"]),
    "too much data": (items(x=array(data=b"\xc4\x0c" + bytes(12))), ["'x'", "takes 8 bytes", "it has 12"]),
    "data that is text": (items(x=array(data=text("01234567"))), ["'x'", "want bytes"]),
    "data beyond its array": (items(x=array(size=20)), ["'x'", "want bytes that end with the array"]),
    "an array beyond its data": (items(x=array(size=40)), ["'x'", "want bytes that end with the array"]),
    "data beyond the file": (items(x=array(numbers(2**20), data=b"\xc6\0\x40\0\0", size=25 + 2**22)), ["truncated"]),
    "a key that is a number": (b"\x82" + text("x") + array() + b"\1" + array(), ["want a string", "integer"]),
    "a key of another script": (b"\x82" + text("x") + array() + b"\xa1\xff" + array(), ["UTF-8"]),
    "a key without end": (b"\x82" + text("x") + array() + b"\xdb\xff\xff\xff\xff", ["4294967295 bytes"]),
    "a long key": (b"\x81\xda\2\1" + b"x" * 513 + array(), ["513 bytes"]),
    "a key twice": (b"\x82" + 2 * (text("x") + array()), ["'x' is there twice"]),
    "a map twice": (items(a=b"\x82" + 2 * (text("x") + items())), ["'a.x' is there twice"]),
    "a name twice": (b"\x82" + text("a.b") + array() + text("a") + items(b=array()), ["'a.b' is there twice"]),
    "a name with a slash twice": (b"\x82" + text("a/b") + array() + text("a") + items(b=array()), ["'a.b' is there"]),
    "a map without end": (b"\xdf\xff\xff\xff\xff" + text("x"), ["more than 262144 entries"]),
    "a map that is cut": (b"\xde\xff\xff" + text("x") + array(), ["truncated"]),
    "deep": ((b"\x81" + text("a")) * 4000 + items(), ["'a.a.", "more than 32 deep"]),
    "deep and long": ((b"\x81" + text("a" * 100)) * 30 + items(), ["more than 512 characters", "…"]),
    "bytes behind its end": (items(x=array()) + b"\0", ["goes on after its end"]),
    "two maps": (2 * items(x=array()), ["goes on after its end"]),
    "a name for a terminal": (items(**{"x\n\x1b[2J": b"\xc0"}), [r"'x\n\x1b[2J' is a null"]),
    "pieces that are not marked": (items(x=pieces(mark=b"\xc2")), ["'x.__msgpack_chunked_array__' is a false"]),
    "pieces marked otherwise": (items(x=pieces(mark=b"\2")), ["'x'", "shape and chunks"]),
    "pieces and more": (items(x=pieces(y=array())), ["'x'", "nothing else"]),
    "pieces without a shape": (items(x=items(__msgpack_chunked_array__=b"\xc3", chunks=items())), ["'x'", "shape"]),
    "no pieces": (items(x=pieces(chunks=items())), ["'x'", "pieces of one dtype"]),
    "a piece that is none": (items(x=pieces(chunks=items(**{"0": b"\1"}))), ["'x'", "pieces of one dtype"]),
    "pieces of other numbers": (items(x=pieces(chunks=items(**{"1": array()}))), ["'x'", "numbered"]),
    "sizes of other numbers": (items(x=pieces(items(**{"1": b"\4"}))), ["'x'", "numbered"]),
    "pieces of two dtypes": (
        items(x=pieces(chunks=items(**{"0": array(), "1": array(dtype=text("int32"))}))),
        ["'x'", "one dtype"],
    ),
    "a piece too many": (items(x=pieces(items(**{"0": b"\3"}))), ["'x'", "takes 12 bytes, its pieces 16"]),
    "pieces of what no array is": (
        items(x=pieces(items(**{str(i): b"\xcf" + (2**47).to_bytes(8, "big") for i in range(2)}))),
        ["'x'", "no array"],
    ),
}


@pytest.mark.parametrize("case", GOOD)
def test_other_ways_to_write_it(tmp_path, case):
    size = {"pieces in another order": (4,), "an extension of fixed size": ()}.get(case, (2,))
    assert_equal(read(write(tmp_path / "a.msgpack", items(x=GOOD[case]))), {"x": np.zeros(size, np.float32)})


@pytest.mark.parametrize("case", BROKEN)
def test_files_that_lie_are_refused(tmp_path, case):
    content, words = BROKEN[case]
    refused(write(tmp_path / "a.msgpack", content), *words, opener=msgpack_file.open_msgpack)


def test_every_cut_is_noticed(tmp_path):
    content = serialization.to_bytes({"a": {"w": ARRAY, "v": HALF}})
    for end in range(2, len(content)):
        refused(write(tmp_path / "a.msgpack", content[:end]), "truncated")


@given(st.sampled_from([*GOOD, *BROKEN]), st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255))))
def test_changed_bytes(case, edits):
    survives(edited(items(x=GOOD[case]) if case in GOOD else BROKEN[case][0], edits), ".msgpack")


def test_arrays_are_views_of_the_file(tmp_path):
    """A sparse file of 3 GiB: what is read costs no memory of our own."""
    size = 3 * 2**30
    head = array(numbers(size // 2), text("float16"), b"\xc6" + size.to_bytes(4, "big"))
    content = b"\x81" + text("w") + b"\xc9" + (len(head) - 6 + size).to_bytes(4, "big") + head[5:]
    path = tmp_path / "a.msgpack"
    with path.open("wb") as file:
        file.write(content)
        file.truncate(len(content) + size)
    tracemalloc.start()
    try:
        with open_tensors(path) as opened:
            loaded = opened.read("w")
            assert loaded.nbytes == size
            assert not loaded.flags.writeable
            assert loaded[-1] == 0
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_many_entries_are_refused_before_they_fill_the_memory(tmp_path):
    """32 MiB of empty maps, a map for each two bytes."""
    count = 2**18
    inner = b"\xdf" + count.to_bytes(4, "big") + b"".join(b"\xa3%03x\x80" % (i % 4096) for i in range(4096))
    content = b"\x8f" + b"".join(text(f"{i:x}") + inner for i in range(15))
    tracemalloc.start()
    try:
        refused(write(tmp_path / "a.msgpack", content), "")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
