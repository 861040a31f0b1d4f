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
from tests.convert.broken_files import edited, refused, survives
from tests.convert.broken_msgpack import BROKEN, array, items, numbers, text
from tests.convert.torch_files import ARRAY, write

HALF = np.array([1, -2.5, 3e38, np.inf], ml_dtypes.bfloat16)


def read(path):
    """Every tensor; its shape and dtype are those promised."""
    with open_tensors(path) as file:
        arrays = {name: file.read(name) for name in file.tensors}
        assert dict(file.tensors) == {name: TensorInfo(a.shape, a.dtype) for name, a in arrays.items()}
    return arrays


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name, values in want.items():
        assert got[name].tobytes() == values.tobytes()
        assert (got[name].shape, got[name].dtype) == (values.shape, values.dtype)


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


GOOD = {
    "lengths of another size": array(b"\xdc\0\1\xcc\2", b"\xda\0\7float32", b"\xc6\0\0\0\x08" + bytes(8)),
    "an extension of fixed size": b"\xd8\3\x93\x90\xa7float32\xc4\4" + bytes(4),
    "pieces in another order": items(
        chunks=items(**{"1": array(), "0": array()}), __msgpack_chunked_array__=b"\xc3", shape=items(**{"0": b"\4"})
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
