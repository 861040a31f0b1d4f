"""The folder of a bulk job: whole files or none, names within it, what a killed write leaves."""

import os
import pickle
import signal
import subprocess
import sys

import fsspec
import pytest

from unclip_jax.bulk import files
from unclip_jax.bulk.store import open_store


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    yield open_store(tmp_path / "out" if request.param == "local" else "memory://bucket/out/")
    fsspec.filesystem("memory").store.clear()


def test_what_is_written_is_read_named_and_removed(store):
    assert store.names() == store.names("parts") == []
    for name, data in {"b.bin": b"b", "a.bin": b"", "parts/1": b"one", "parts/deep/2": b"two", ".x": b""}.items():
        store.write(name, data)
        assert store.read(name) == data
    assert store.names() == ["a.bin", "b.bin"]
    assert store.names("parts") == store.names("parts/") == ["parts/1"]
    store.write("b.bin", b"again")
    assert store.read("b.bin") == b"again"
    store.remove("b.bin")
    store.remove("b.bin")
    store.remove_leftovers("nowhere")
    store.remove_folder("parts")
    assert [store.exists(name) for name in ("a.bin", "b.bin", "parts/1", "nowhere/1")] == [True, False, True, False]
    with pytest.raises(FileNotFoundError, match=r"b\.bin"):
        store.read("b.bin")


def test_it_is_the_same_in_another_process(store):
    store.write("a", b"a")
    assert pickle.loads(pickle.dumps(store)).read("a") == b"a"


def test_a_relative_path_holds_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = open_store("out")
    monkeypatch.chdir("/")
    store.write("a", b"a")
    assert open_store(f"file://{tmp_path}/out").read("a") == (tmp_path / "out" / "a").read_bytes() == b"a"


@pytest.mark.parametrize("name", ["", "..", "../x", "a/../../x", "/etc/x", "memory://x", "simplecache::x"])
def test_names_stay_within(store, name):
    for use in (store.read, store.exists, store.remove, lambda name: store.write(name, b"")):
        with pytest.raises(ValueError, match="want a path within"):
            use(name)


def test_a_part_of_a_file(store):
    store.write("a", bytes(range(100)))
    place = files.joined(store.address, "a")
    assert files.read_file(place, (10, 5)) == bytes(range(10, 15))


KILLED = """
import os, signal, sys
from pathlib import Path
from unclip_jax.checkpoints.atomic import replaced_file
with replaced_file(Path(sys.argv[1])) as partial:
    partial.write_bytes(b"half")
    print("written", flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
"""


def test_leftovers_of_killed_writes_alone_are_removed(tmp_path):
    store = open_store(tmp_path)
    store.write("parts/a", b"before")
    kept = [".notes.partial-x", ".b.partial-1"]
    for name in kept:
        (tmp_path / "parts" / name).touch()
    run = [sys.executable, "-c", KILLED, str(tmp_path / "parts" / "a")]
    assert subprocess.run([*run, "killed"], stdout=subprocess.PIPE).returncode == -signal.SIGKILL
    with subprocess.Popen([*run, "alive"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as alive:
        assert alive.stdout.readline() == b"written\n"
        assert len(os.listdir(tmp_path / "parts")) == 5
        store.remove_leftovers()
        assert len(os.listdir(tmp_path / "parts")) == 5
        store.remove_leftovers("parts", "a")
        assert sorted(os.listdir(tmp_path / "parts")) == sorted([f".a.partial-{alive.pid}", *kept, "a"])
        assert store.read("parts/a") == b"before"
        alive.communicate()
    assert store.read("parts/a") == b"half"
    assert store.names("parts") == ["parts/a"]
    store.remove_leftovers("parts")
    assert sorted(os.listdir(tmp_path / "parts")) == [".notes.partial-x", "a"]


def test_what_cannot_be_opened_is_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file: a file; want a folder"):
        open_store(tmp_path / "file")
    with pytest.raises(ValueError, match=r"nothing://x: .*nothing"):
        open_store("nothing://x")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ModuleNotFoundError, match=r"gs://bucket/x: .*: pip install gcsfs$"):
        open_store("gs://key@bucket/x?token=secret")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs fsspec: pip install 'unclip-jax\[bulk\]'"):
        open_store("memory://x")
    assert open_store(tmp_path / "local").names() == []


def test_errors_of_a_store_are_oserrors_that_name_it(monkeypatch):
    class Odd(Exception):
        pass

    def fails(*_, **__):
        raise Odd("the service\nis away")

    store = open_store("memory://bucket/out")
    monkeypatch.setattr(fsspec.filesystem("memory"), "pipe_file", fails)
    with pytest.raises(OSError, match=r"^memory://bucket/out/a: the service is away$"):
        store.write("a", b"")
