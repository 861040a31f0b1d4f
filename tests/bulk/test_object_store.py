"""A bulk job's input and store on a server of S3's interface, through s3fs."""

import threading
from http.server import ThreadingHTTPServer

import fsspec
import fsspec.config
import localbucket
import pytest

from tests.bulk.pictures import png, tar
from unclip_jax.bulk.inputs import read_rows
from unclip_jax.bulk.rows import resolve
from unclip_jax.bulk.store import open_store
from unclip_jax.pipelines.arguments import UnCLIPArguments

pytestmark = pytest.mark.e2e


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The address of an empty bucket."""
    (tmp_path / "bucket").mkdir()
    monkeypatch.setattr(localbucket.S3Handler, "data_root", tmp_path, raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), localbucket.S3Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        settings = {"endpoint_url": f"http://127.0.0.1:{server.server_port}", "key": "a", "secret": "b"}
        monkeypatch.setitem(fsspec.config.conf, "s3", settings)
        yield "s3://bucket"
        server.shutdown()
        thread.join()


def test_rows_and_files_of_an_object_store(bucket):
    store = open_store(f"{bucket}/job")
    assert store.names() == []
    assert not store.exists("a.jsonl")
    for i in range(3):
        store.write(f"pictures/deep/{i}.png", png(i))
    store.write("t.jsonl", b'{"image": "pictures/deep/1.png"}\n{"image": "gone.png"}\n')
    store.write("t-00.tar", tar({"a.png": png(4), "a.txt": b"text"}))
    store.write("large.bin", bytes(7 << 20))  # in parts
    assert store.names() == ["large.bin", "t-00.tar", "t.jsonl"]
    assert store.read("large.bin") == bytes(7 << 20)
    assert store.exists("t.jsonl")

    below = list(read_rows(f"{bucket}/job/pictures", UnCLIPArguments))
    assert [row.values["image"].name for row in below] == ["deep/0.png", "deep/1.png", "deep/2.png"]
    assert [resolve(row)["image"] for row in below] == [png(0), png(1), png(2)]
    table = list(read_rows(f"{bucket}/job/t.jsonl", UnCLIPArguments))
    assert resolve(table[0])["image"] == png(1)
    with pytest.raises(FileNotFoundError, match=r"row 1: image: gone\.png: no such file"):
        resolve(table[1])
    (sample,) = read_rows(f"{bucket}/job/t-*.tar", UnCLIPArguments)
    assert resolve(sample) == {"image": png(4), "prompt": "text"}

    store.remove("t.jsonl")
    store.remove("t.jsonl")
    assert store.names() == ["large.bin", "t-00.tar"]
    with pytest.raises(FileNotFoundError, match=r"s3://bucket/job/t\.jsonl: no such file"):
        store.read("t.jsonl")


def test_other_processes_see_what_was_written(bucket):
    """fsspec remembers listings; a store does not."""
    mine, theirs = open_store(bucket), open_store(bucket)
    assert mine.names() == theirs.names() == []
    fsspec.filesystem("s3").ls("bucket")
    (system, _) = fsspec.core.url_to_fs(bucket)
    system.dircache["bucket"] = []  # as it is where another process has written since
    theirs.write("a", b"a")
    system.dircache["bucket"] = []
    assert mine.names() == ["a"]
    assert mine.exists("a")


def test_a_server_that_is_away_is_an_oserror(monkeypatch):
    settings = {"endpoint_url": "http://127.0.0.1:9", "key": "a", "secret": "b"}
    monkeypatch.setitem(fsspec.config.conf, "s3", settings | {"config_kwargs": {"retries": {"max_attempts": 0}}})
    with pytest.raises(OSError, match="s3://bucket/a: "):
        open_store("s3://bucket").read("a")
