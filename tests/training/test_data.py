"""Folders of images: what is read, in which order, by which host, and what is refused or skipped by name."""

import collections
import csv
import json

import numpy as np
import pytest
from PIL import ExifTags, Image

from unclip_jax.conditioning.clip_image import load_image
from unclip_jax.training.data import Record, Skipped, batches, image_folder, load_rgb, select


def picture(path, colour=(255, 0, 0), mode="RGB", size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


@pytest.fixture
def folder(tmp_path):
    """Twelve images, each of its own grey, with texts and scores."""
    rows = []
    for i in range(12):
        picture(tmp_path / "train" / f"{i:02d}.png", (i, i, i))
        rows.append({"file_name": f"train/{i:02d}.png", "text": f"number {i}", "score": i / 2, "width": 6})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return tmp_path


def greys(batch):
    return batch["grey"].tolist()


def load(record, rng):
    return {"grey": int(load_rgb(record)[0, 0, 0]), "length": len(record.text)}


def flat(lists):
    return [value for values in lists for value in values]


def take(iterator, count):
    return [greys(next(iterator)) for _ in range(count)]


def test_metadata_of_both_kinds(folder):
    records = image_folder(folder)
    assert [record.text for record in records] == [f"number {i}" for i in range(12)]
    assert records[3].columns == {"score": 1.5, "width": 6}
    rows = [{"file_name": str(r.path.relative_to(folder)), "text": r.text, **r.columns} for r in records]
    (folder / "metadata.jsonl").unlink()
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    again = image_folder(folder)
    assert [(r.path, r.text, float(r.columns["score"])) for r in again] == [
        (r.path, r.text, r.columns["score"]) for r in records
    ]


def test_without_metadata_every_image_is_taken(tmp_path):
    for name in ("b.jpg", "a/c.PNG", "a/d.webp"):
        picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    records = image_folder(tmp_path)
    assert [r.path.name for r in records] == ["c.PNG", "d.webp", "b.jpg"]
    assert {r.text for r in records} == {""}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: has no file_name"),
        ('{"file_name": 3}', "line 2: has no file_name"),
        ('{"file_name": "../x.png"}', "points outside the folder"),
        ('{"file_name": "/etc/passwd"}', "points outside the folder"),
        ('{"file_name": "y.png", "text": 3}', "text is 3"),
        ('{"file_name": "x.png"}', "x.png is listed twice"),
    ],
)
def test_broken_metadata(tmp_path, line, words):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "x.png"}\n' + line + "\n")
    with pytest.raises(ValueError, match=words):
        image_folder(tmp_path)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        image_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no images"):
        image_folder(tmp_path)
    for name in ("metadata.jsonl", "metadata.csv"):
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match="want one of them"):
        image_folder(tmp_path)


def test_ranges_of_columns(folder):
    records = image_folder(folder)
    assert [r.columns["score"] for r in select(records, score=(2, 3.5), width=(None, 6))] == [2.0, 2.5, 3.0, 3.5]
    assert select(records, width=(7, None)) == []
    with pytest.raises(ValueError, match=r"00\.png: column beauty is None"):
        select(records, beauty=(1, None))


def test_every_pass_is_whole_and_in_another_order(folder):
    iterator = batches(image_folder(folder), load, batch_size=4, seed=1)
    first, second = (flat(take(iterator, 3)) for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert first != sorted(first)
    assert take(batches(image_folder(folder), load, batch_size=4, seed=1, threads=1), 3) == [
        first[i : i + 4] for i in (0, 4, 8)
    ]
    assert flat(take(batches(image_folder(folder), load, batch_size=4, seed=2), 3)) != first


@pytest.mark.parametrize("hosts", [2, 3])
def test_hosts_share_every_batch(hosts, folder):
    records = image_folder(folder)
    shares = [take(batches(records, load, batch_size=2, seed=1, host=h, hosts=hosts), 9) for h in range(hosts)]
    together = [flat(parts) for parts in zip(*shares, strict=True)]
    assert together == take(batches(records, load, batch_size=2 * hosts, seed=1), 9)


def of_hosts(records, hosts, batch_size=6):
    size = batch_size // hosts
    return [batches(records, load, batch_size=size, seed=1, host=host, hosts=hosts) for host in range(hosts)]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (3, 2), (2, 2)])
def test_another_number_of_hosts_goes_on(before, after, folder):
    records = image_folder(folder)
    there, alone = of_hosts(records, before), batches(records, load, batch_size=6, seed=1)
    for iterator in (*there, alone):
        take(iterator, 5)
    states = json.loads(json.dumps([iterator.get_state() for iterator in there]))
    others = of_hosts(records, after)
    for iterator in others:
        iterator.set_state(states)
    assert [flat(parts) for parts in zip(*(take(i, 4) for i in others), strict=True)] == take(alone, 4)


def test_where_hosts_are_not_equally_far_no_image_is_skipped(folder):
    """Images that cannot be read have brought one of two hosts further in the order, by more than a batch."""
    for number in (3, 4, 5):
        (folder / "train" / f"{number:02d}.png").write_bytes(b"no picture")
    records = image_folder(folder)
    there = of_hosts(records, 2)
    seen = flat(flat(take(iterator, 9)) for iterator in there)
    states = [iterator.get_state() for iterator in there]
    least, most = sorted(state["next_index"] // 3 for state in states)
    assert least < most
    (alone,) = of_hosts(records, 1)
    alone.set_state(states)
    place = alone.get_state()["next_index"]
    before, order = collections.Counter(), batches(records, load, batch_size=1, seed=1)
    while order.get_state()["next_index"] < place:
        before.update(greys(next(order)))
    assert place > 36
    assert not before - collections.Counter(seen)
    for iterator, state in zip(of_hosts(records, 2), states, strict=True):  # as many as there were: each its own place
        iterator.set_state(states)
        assert iterator.get_state() == state


def test_a_place_can_be_gone_back_to(folder):
    records = image_folder(folder)
    iterator = batches(records, load, batch_size=5, seed=3)
    take(iterator, 4)
    state = json.loads(json.dumps(iterator.get_state()))
    want = take(iterator, 5)
    other = batches(records, load, batch_size=5, seed=3)
    other.set_state([state])
    assert take(other, 5) == want


def test_broken_images_are_skipped_and_named(folder):
    (folder / "train" / "03.png").write_bytes(b"no picture")
    (folder / "train" / "07.png").write_bytes((folder / "train" / "06.png").read_bytes()[:40])
    (folder / "train" / "09.png").unlink()
    skipped = Skipped()
    iterator = batches(image_folder(folder), load, batch_size=3, seed=1, skipped=skipped)
    assert sorted(flat(take(iterator, 3))) == [0, 1, 2, 4, 5, 6, 8, 10, 11]
    assert {name[-6:] for name in skipped.reasons} == {"03.png", "07.png", "09.png"}
    assert len(skipped) == 3
    state = iterator.get_state()
    want = take(iterator, 3)
    iterator.set_state([state])
    assert take(iterator, 3) == want


def test_when_nothing_can_be_read(folder):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="no image can be read"):
        next(batches(image_folder(folder), load, batch_size=2, seed=1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 13}, "batch_size is 13"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 5, "hosts": 3}, "batch_size is 5 on each of 3 hosts; there are only 12 images"),
        ({"batch_size": 1, "host": 2, "hosts": 2}, "host is 2"),
    ],
)
def test_shares_that_are_none(folder, options, words):
    with pytest.raises(ValueError, match=words):
        batches(image_folder(folder), load, seed=0, **options)


def test_transparent_parts_are_white(tmp_path):
    picture(tmp_path / "a.png", (10, 20, 30, 0), "RGBA")
    np.testing.assert_array_equal(load_rgb(Record(tmp_path / "a.png", "", {})), np.full((4, 6, 3), 255))
    Image.new("P", (2, 2), 0).save(tmp_path / "b.gif", transparency=0)
    np.testing.assert_array_equal(load_rgb(Record(tmp_path / "b.gif", "", {})), np.full((2, 2, 3), 255))


def test_images_are_read_as_pipelines_read_them(tmp_path):
    """Upright, 16 bits scaled, whatever the colour mode; of a file of its own or of a part of a tar."""
    colours = np.random.default_rng(0).integers(0, 256, (40, 80, 3), np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(colours).save(tmp_path / "phone.jpg", exif=exif)
    Image.fromarray(np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)).save(tmp_path / "gray16.png")
    Image.fromarray(colours).convert("CMYK").save(tmp_path / "cmyk.tif")
    Image.fromarray(colours).quantize(16).save(tmp_path / "palette.png", transparency=3)
    frames = [Image.fromarray(colours[..., 0]), Image.fromarray(colours[..., 1])]
    frames[0].save(tmp_path / "animated.gif", save_all=True, append_images=frames[1:])
    whole = tmp_path / "whole"
    for record in image_folder(tmp_path):
        want = load_image(record.path)
        np.testing.assert_array_equal(load_rgb(record), want)
        content = record.path.read_bytes()
        whole.write_bytes(b"before" + content + b"after")
        np.testing.assert_array_equal(load_rgb(Record(whole, "", {}, (6, len(content)), "x")), want)
    assert load_rgb(Record(tmp_path / "phone.jpg", "", {})).shape == (80, 40, 3)
    assert 127 < load_rgb(Record(tmp_path / "gray16.png", "", {})).mean() < 128


def test_an_image_that_is_too_large_is_skipped_and_named(folder, monkeypatch):
    picture(folder / "train" / "03.png", (1, 2, 3), size=(60, 50))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    skipped = Skipped()
    take(batches(image_folder(folder), load, batch_size=11, seed=1, skipped=skipped), 1)
    (reason,) = skipped.reasons.values()
    assert "3000 pixels" in reason
