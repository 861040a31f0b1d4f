"""The inputs of bulk jobs: folders, tables, tars and standard input, local and at an address; what is refused."""

import csv
import io
import itertools
import json
import pickle
import sys
import time
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from tests.bulk.pictures import png, tar
from unclip_jax.bulk import files
from unclip_jax.bulk.inputs import read_rows
from unclip_jax.bulk.rows import resolve
from unclip_jax.bulk.store import open_store
from unclip_jax.pipelines.arguments import InpaintArguments, TextToImageArguments, UnCLIPArguments
from unclip_jax.training.data import image_folder

ROWS = [
    {"image": "p/0.png", "prompt": "one", "seed": 5, "score": 0.5},
    {"image": "p/1.png", "prompt": "two, three", "seed": None, "score": 1.5},
    {"image": "p/2.png", "prompt": "drei\u00e9", "seed": 7, "score": None},
]


def jsonl(rows):
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def table_csv(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8-sig")


def parquet(rows):
    data = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), data, row_group_size=2)
    return data.getvalue()


TABLES = {"jsonl": jsonl, "csv": table_csv, "parquet": parquet}


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    yield open_store(tmp_path if request.param == "local" else "memory://bucket/in")
    fsspec.filesystem("memory").store.clear()


def at(store, name):
    return files.joined(store.address, name)


def rows(source, arguments=UnCLIPArguments, **options):
    return list(read_rows(source, arguments, **options))


def images(made):
    """The bytes of each row's image, read in what could be another process."""
    return [resolve(row)["image"] for row in pickle.loads(pickle.dumps(made))]


@pytest.mark.parametrize("kind", TABLES)
def test_a_table(store, kind):
    for i in range(3):
        store.write(f"p/{i}.png", png(i))
    store.write(f"t.{kind}", TABLES[kind](ROWS))
    made = rows(at(store, f"t.{kind}"))
    assert [row.number for row in made] == [0, 1, 2]
    assert [row.values["prompt"] for row in made] == ["one", "two, three", "drei\u00e9"]
    assert [row.values.get("seed") for row in made] == [5, None, 7]
    assert [float(row.others["score"]) if row.others else None for row in made] == [0.5, 1.5, None]
    assert images(made) == [png(0), png(1), png(2)]


@pytest.mark.parametrize("kind", TABLES)
def test_a_folder_with_metadata(store, kind):
    for i in range(3):
        store.write(f"p/{i}.png", png(i))
    given = [{"file_name": row["image"], "text": row["prompt"], "score": row["score"]} for row in ROWS[:2]]
    store.write(f"metadata.{kind}", TABLES[kind](given))
    made = rows(store.address)
    assert [(row.values["prompt"], float(row.others["score"])) for row in made] == [("one", 0.5), ("two, three", 1.5)]
    assert images(made) == [png(0), png(1)]
    store.write("metadata.jsonl" if kind == "csv" else "metadata.csv", b"")
    with pytest.raises(ValueError, match=r"has metadata.*; want one of them"):
        rows(store.address)


def test_a_folder_without_metadata_is_in_the_order_of_training(store, tmp_path):
    names = ["b.jpg", "a/c.PNG", "a.png", "a/b/z.webp", "a-b/1.png", "a/x.gif", ".png", "notes.txt"]
    for level, name in enumerate(names):
        store.write(name, png(level))
        open_store(tmp_path).write(name, png(level))
    made = rows(store.address)
    want = [path.relative_to(tmp_path).as_posix() for path, *_ in image_folder(tmp_path)]
    assert [row.values["image"].name for row in made] == want
    assert len(want) == 6
    assert images(made) == [png(names.index(name)) for name in want]


def test_links_in_a_folder_lead_nowhere_endless(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    assert [row.values["image"].name for row in rows(tmp_path)] == ["a.png", "b.png"]


def test_pictures_in_parquet(store):
    store.write("b.png", png(2))
    given = [{"image": {"bytes": png(1), "path": "x"}, "text": "a"}, {"image": {"bytes": None, "path": "b.png"}}]
    store.write("t.parquet", parquet(given))
    assert images(rows(at(store, "t.parquet"))) == [png(1), png(2)]
    assert [row.others for row in rows(at(store, "t.parquet"), TextToImageArguments)] == [{}, {}]


def test_tars(store):
    members = {}
    for i in range(3):
        members |= {f"p/{i}.png": png(i), f"p/{i}.txt": f" caption {i}\n".encode()}
    members |= {"q/3.mask_image.png": png(99), "q/3.PNG": png(3), "q/3.json": b'{"caption": "c", "seed": 4, "n": 1}'}
    store.write("a-00.tar", tar(members | {"q/4.cls": b"1"}))
    store.write("a-01.tar", tar({"5.json": b'{"prompt": "no picture"}'}))
    for pattern in ("a-{00..01}.tar", "a-*.tar", "a-0[01].tar"):
        made = rows(at(store, pattern), InpaintArguments)
        assert [row.number for row in made] == list(range(5))
        assert [row.values["prompt"] for row in made] == [
            *(f"caption {i}" for i in range(3)),
            "c",
            "no picture",
        ]
        assert [row.others["__key__"] for row in made] == ["p/0", "p/1", "p/2", "q/3", "5"]
        assert made[3].others["n"] == 1
        assert made[3].values["seed"] == 4
        assert images(made[:4]) == [png(0), png(1), png(2), png(3)]
        assert resolve(made[3])["mask_image"] == png(99)
        assert made[0].values["image"].name == "a-00.tar: p/0.png"
    assert "mask_image" not in rows(at(store, "a-00.tar"))[3].values


def test_several_files_by_number(store):
    for i in range(8, 12):
        store.write(f"{i}.jsonl", jsonl([{"prompt": str(i)}]))
    for pattern, want in {"{8..11}.jsonl": "8 9 10 11", "{10..11}.jsonl": "10 11", "?.jsonl": "8 9"}.items():
        assert [row.values["prompt"] for row in rows(at(store, pattern))] == want.split()
    with pytest.raises(FileNotFoundError, match=r"7\.jsonl: no such file"):
        rows(at(store, "{7..8}.jsonl"))


def test_standard_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.png").write_bytes(png(1))
    made = rows(
        "-",
        stdin=io.StringIO('{"image": "a.png"}\n\n{"image": "a.png", "text_en": "x"}\n'),
        names={"text_en": "prompt"},
    )
    monkeypatch.chdir("/")
    assert images(made) == [png(1), png(1)]
    assert made[1].values["prompt"] == "x"
    monkeypatch.setattr(sys, "stdin", io.StringIO("{}\n"))
    assert len(rows("-")) == 1


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("t.jsonl", b'{"seed": 1}\n{"seed"\n', r"t\.jsonl, line 2: not JSON"),
        ("t.jsonl", b'{"seed": 1}\n\n[1]\n', r"t\.jsonl, line 3: want an object"),
        ("t.jsonl", b'{"prompt": "\xff"}\n', r"t\.jsonl, after line 0: not UTF-8"),
        ("t.jsonl", b"\n", "holds no rows"),
        ("t.jsonl", b'{"batch_size": 3}\n', r"t\.jsonl, line 1: column batch_size is a setting"),
        ("t.csv", b"seed,prompt\n1,a\n1,a,b\n", r"t\.csv, line 3: has more cells"),
        ("t.csv", b"seed,prompt\n1," + b"a" * 200_000, r"t\.csv, after line 1: not CSV"),
        ("t.csv", b"seed\n", "holds no rows"),
        ("t.parquet", b"PAR1", r"t\.parquet: not parquet"),
        ("t.parquet", parquet(ROWS)[:-40] + b"x" * 40, r"t\.parquet: not parquet"),
        ("t.tar", b"no tar", r"t\.tar: not an uncompressed tar"),
        ("t.tar", tar({"a.png": png(1)}, "w:gz"), r"t\.tar: not an uncompressed tar"),
        ("t.tar", tar({"a.png": png(1), "b.png": b"x" * 9000})[:4096], r"t\.tar: not an uncompressed tar"),
        ("t.tar", tar({"a.json": b"{"}), r"t\.tar: a\.json: not JSON"),
        ("t.tar", tar({"a.cls": b"1"}), "holds no rows"),
        ("t.txt", b"", "want a folder, or a"),
    ],
)
def test_what_is_broken_is_refused_by_name(store, name, data, words):
    store.write(name, data)
    with pytest.raises(ValueError, match=words):
        rows(at(store, name))


def test_what_is_not_there(store, tmp_path):
    for name in ("nothing.jsonl", "nothing.tar", "nothing-*.csv", "nothing.parquet"):
        with pytest.raises(FileNotFoundError, match=r"nothing.*: no such file"):
            rows(at(store, name))
    with pytest.raises(FileNotFoundError, match="nothing: no such folder or file"):
        read_rows(tmp_path / "nothing", UnCLIPArguments)  # before the first row is asked for
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: holds no rows"):
        rows(tmp_path / "empty")


def test_no_name_leaves_a_folder_or_an_address(store):
    line = jsonl([{"image": "../x.png"}])
    store.write("metadata.jsonl", line)
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 1: '\.\./x\.png' points outside"):
        rows(store.address)
    store.write("t.jsonl", line)
    if store.address.startswith("memory://"):
        with pytest.raises(ValueError, match="points outside"):
            rows(at(store, "t.jsonl"))
    else:
        assert rows(at(store, "t.jsonl"))[0].values["image"].place == f"{store.address}/../x.png"


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "t.parquet").write_bytes(parquet(ROWS))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"t\.parquet: .*: pip install 'unclip-jax\[bulk\]'"):
        rows(tmp_path / "t.parquet")


def test_a_million_rows_take_no_memory(tmp_path):
    """What is held after some hundreds of rows is what is held after thousands."""
    line = jsonl([{"image": "a.png", "prompt": "x" * 200, "seed": 1, "url": "y" * 200}])
    (tmp_path / "t.jsonl").write_bytes(line * 2_500)
    (tmp_path / "t.tar").write_bytes(tar({f"{i:05}.png": b"" for i in range(2_500)}))
    for name in ("t.jsonl", "t.tar"):
        made = read_rows(tmp_path / name, UnCLIPArguments)
        assert len(list(itertools.islice(made, 500))) == 500
        before = sys.getallocatedblocks()
        assert sum(1 for _ in itertools.islice(made, 1_900)) == 1_900
        assert sys.getallocatedblocks() - before < 300, name
        made.close()


def test_rows_are_read_as_fast_as_a_job_needs_them(tmp_path):
    """20,000 rows in 0.3 s of a core; a job makes a few pictures a second."""
    given = {"image": "p/a.png", "prompt": "a photograph of a cup of coffee", "seed": 1, "score": 0.5, "url": "u"}
    (tmp_path / "t.jsonl").write_bytes(jsonl([given]) * 20_000)
    start = time.process_time()
    assert sum(1 for _ in read_rows(tmp_path / "t.jsonl", UnCLIPArguments)) == 20_000
    assert time.process_time() - start < 1.5  # five times what is wanted: other tests may be running
