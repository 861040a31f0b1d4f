"""Webdataset's tars: samples by name, read in place; broken ones refused by name."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from unclip_jax.training.data import Skipped, batches, load_rgb, select
from unclip_jax.training.webdataset import tar_samples


def png(level):
    data = io.BytesIO()
    Image.new("RGB", (4, 4), (level, 0, 0)).save(data, "PNG")
    return data.getvalue()


def write(path, members, mode="w:"):
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def tar(tmp_path):
    members = {}
    for number in range(5):
        members[f"part/{number:04d}.png"] = png(10 * number)
        members[f"part/{number:04d}.txt"] = f" caption {number}\n".encode()
    members["part/0005.json"] = json.dumps({"caption": "in JSON", "score": 5}).encode()
    members["part/0005.PNG"] = png(50)
    members["part/0006.txt"] = b"a text without its picture"
    return write(tmp_path / "a.tar", members)


def test_samples_are_grouped_by_their_keys(tar):
    records = tar_samples([tar])
    assert [record.key for record in records] == [f"part/{number:04d}" for number in range(6)]
    assert [record.text for record in records] == [*(f"caption {n}" for n in range(5)), "in JSON"]
    assert [int(load_rgb(record)[0, 0, 0]) for record in records] == [0, 10, 20, 30, 40, 50]
    assert select(records[5:], score=(5, None)) == records[5:]
    assert str(records[2]) == f"{tar}: part/0002"


def test_several_tars_are_one_set_in_batches(tar, tmp_path):
    other = write(tmp_path / "b.tar", {"x.webp.png": b"", "y.png": png(200), "z.png": b"broken"})
    records = tar_samples([tar, other])
    assert len(records) == 8  # x.webp.png has no suffix of an image
    skipped = Skipped()
    iterator = batches(records, lambda record, rng: {"x": load_rgb(record)}, batch_size=7, seed=0, skipped=skipped)
    assert sorted(next(iterator)["x"][:, 0, 0, 0]) == [0, 10, 20, 30, 40, 50, 200]
    next(iterator)
    assert list(skipped.reasons) == [f"{other}: z"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.txt": b"x"}, "holds no images"),
        ({"a.png": png(1), "a.json": b"{"}, "a.json: not JSON"),
        ({"a.png": png(1), "a.json": b"[]"}, "a.json: want an object"),
        ({"a.png": png(1), "a.json": b'{"text": 3}'}, "text is 3"),
        ({"a.png": png(1), "a.txt": b"\xff\xfe"}, "a.txt"),
        ({"a.png": png(1), "a.txt": b"x" * (1 << 21)}, "want at most"),
    ],
    ids=["no picture", "broken", "list", "number", "bytes", "endless"],
)
def test_what_is_broken_is_refused_by_name(members, message, tmp_path):
    path = write(tmp_path / "bad.tar", members)
    with pytest.raises(ValueError, match=message) as raised:
        tar_samples([path])
    assert "bad.tar" in str(raised.value)


def test_other_files_are_refused(tmp_path, tar):
    with pytest.raises(FileNotFoundError):
        tar_samples([tmp_path / "none.tar"])
    packed = write(tmp_path / "packed.tar", {"a.png": png(1)}, "w:gz")
    with pytest.raises(ValueError, match=r"packed\.tar: not an uncompressed tar"):
        tar_samples([packed])
    cut = tmp_path / "cut.tar"
    cut.write_bytes(tar.read_bytes()[:1300])
    with pytest.raises(ValueError, match=r"cut\.tar"):
        tar_samples([cut])


def test_links_are_no_images(tmp_path):
    path = tmp_path / "links.tar"
    with tarfile.open(path, "w:") as file:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(info)
    with pytest.raises(ValueError, match="holds no images"):
        tar_samples([path])


def test_arrays_are_as_stored(tar):
    np.testing.assert_array_equal(load_rgb(tar_samples([tar])[3]), np.full((4, 4, 3), (30, 0, 0)))
