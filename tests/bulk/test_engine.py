"""Bulk jobs with the smallest of models: what they make is what calls make, however they are interrupted."""

import dataclasses
import io
import json
import os
import tarfile

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from tests.bulk.job_files import files, records
from tests.bulk.jobs import SETTINGS, SIZES
from tests.pipelines.small_family import photo
from unclip_jax import bulk
from unclip_jax.bulk import engine
from unclip_jax.pipelines.run import sample_latents


@pytest.fixture(scope="module")
def undisturbed(pipe, rows, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    return out, bulk.run(pipe, rows, out, save="latents", **SIZES, **SETTINGS)


def test_what_a_job_makes_is_what_calls_make(pipe, rows, undisturbed):
    out, summary = undisturbed
    assert dataclasses.astuple(summary)[:4] == (10, 9, 1, 9)
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    for record in records(out):
        number, line = record["row"], {k: v for k, v in lines[record["row"]].items() if k != "id"}
        assert record["columns"] == {"id": f"row {number}"}
        if number == 3:
            assert record["status"] == "failed"
            assert "not an image" in record["reason"]
            continue
        images = line.pop("image")
        images = [photo(int(name[0])) for name in (images if isinstance(images, list) else [images])]
        # Without a seed of its own, a row has the noise of that index in one call with all rows.
        request = pipe.check(image=images, **{**SETTINGS, **line})
        if "seed" not in line:
            request = dataclasses.replace(request, indices=np.array([number], np.int32))
        want = sampled(pipe, request)
        got = np.load(out / record["file"])
        assert np.linalg.norm(got - want) <= 2e-5 * np.linalg.norm(want)
        assert (record["seed"], record["index"]) == (line.get("seed", 0), 0 if "seed" in line else number)


def sampled(pipe, request):
    return sample_latents(pipe.parts, request, pipe.task.conditions(pipe.parts, request))[0]


def test_the_manifest_says_the_same_in_both_forms(undisturbed):
    out, _ = undisturbed
    lines = records(out)
    tables = [pyarrow.parquet.read_table(path).to_pylist() for path in sorted(out.glob("manifest/*.parquet"))]
    for line, row in zip(lines, [row for table in tables for row in table], strict=True):
        assert row | {"recipe": json.loads(row["recipe"]), "columns": json.loads(row["columns"])} == line
    parts = [json.loads(path.read_text()) for path in sorted(out.glob("manifest/*.json"))]
    assert [(part["rows"], part["images"], part["failed"]) for part in parts] == [(6, 5, 1), (4, 4, 0)]
    assert not list(out.glob("working/*/*"))


@pytest.mark.parametrize("shards", [False, True])
def test_an_interrupted_job_goes_on_and_makes_the_same_bytes(pipe, rows, tmp_path, monkeypatch, shards):
    """Interrupted again and again after a few files, in a batch, between two and in the writing of a manifest."""
    settings = {"save": "latents", "shards": shards, **SIZES, **SETTINGS}
    bulk.run(pipe, rows, tmp_path / "whole", **settings)
    write, left = engine.Store.write, 0
    runs = 0

    def stumbling(self, name, data):
        nonlocal left
        if left == 0:
            partial = tmp_path / "interrupted" / name
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.with_name(f".{partial.name}.partial-1").touch()  # as a kill leaves it
            raise KeyboardInterrupt
        left -= 1
        write(self, name, data)

    monkeypatch.setattr(engine.Store, "write", stumbling)
    while True:
        left, runs = 6 + runs % 3, runs + 1  # a batch of four, its record, and no more than a few
        try:
            bulk.run(pipe, rows, tmp_path / "interrupted", **settings)
            break
        except KeyboardInterrupt:
            assert runs < 12
    assert runs > 3
    assert files(tmp_path / "interrupted") == files(tmp_path / "whole")
    assert os.listdir(tmp_path / "interrupted/working") == []


def test_a_job_that_is_done_makes_nothing_again(pipe, rows, undisturbed, monkeypatch):
    out, _ = undisturbed
    monkeypatch.setattr(engine.Maker, "begin", None)
    before = files(out)
    summary = bulk.run(pipe, rows, out, save="latents", **SIZES, **SETTINGS)
    assert dataclasses.astuple(summary)[:4] == (10, 9, 1, 0)
    assert files(out) == before


def test_hosts_share_the_parts(pipe, rows, undisturbed, tmp_path):
    out, _ = undisturbed
    for host in (1, 0):
        bulk.run(pipe, rows, tmp_path / "out", save="latents", host=host, hosts=2, **SIZES, **SETTINGS)
    assert files(tmp_path / "out") == files(out) | {"job.json": (tmp_path / "out/job.json").read_bytes()}
    with pytest.raises(ValueError, match="host is 2; want 0 to 1"):
        bulk.run(pipe, rows, tmp_path / "out", host=2, hosts=2)


def test_a_tar_of_each_part_has_its_files_and_their_records(pipe, rows, undisturbed, tmp_path):
    out, _ = undisturbed
    bulk.run(pipe, rows, tmp_path / "out", save="latents", shards=True, **SIZES, **SETTINGS)
    assert not (tmp_path / "out/files").exists()
    for record in records(tmp_path / "out"):
        if record["status"] == "made":
            shard, _, name = record["file"].rpartition("/")
            with tarfile.open(tmp_path / "out" / shard) as tar:
                data = tar.extractfile(name).read()
                told = json.loads(tar.extractfile(f"{name.partition('.')[0]}.json").read())
            assert data == (out / f"files/{shard[-10:-4]}/{name}").read_bytes()
            assert told == {k: v for k, v in record.items() if k != "seconds"}


@pytest.fixture(scope="module")
def pictures_made(pipe, rows, tmp_path_factory):
    out = tmp_path_factory.mktemp("pictures") / "out"
    bulk.run(pipe, rows, out, **SIZES, **SETTINGS)
    return out


def test_pictures_are_the_decoded_latents_with_their_recipes(pipe, undisturbed, pictures_made):
    latents = {record["row"]: undisturbed[0] / record["file"] for record in records(undisturbed[0]) if record["file"]}
    for record in records(pictures_made):
        if record["file"]:
            want = pipe.to_pil(pipe.decode_latents(np.load(latents[record["row"]])[None]))[0]
            with Image.open(pictures_made / record["file"]) as picture:
                assert np.abs(np.asarray(picture, int) - np.asarray(want, int)).max() <= 1
                assert json.loads(picture.text["unclip_jax"]) == record["recipe"]


def test_the_order_of_settings_changes_no_byte(pipe, rows, pictures_made, tmp_path):
    bulk.run(pipe, rows, tmp_path / "out", **SIZES, **dict(reversed(SETTINGS.items())))
    assert files(tmp_path / "out") == files(pictures_made) | {"job.json": (tmp_path / "out/job.json").read_bytes()}


@pytest.mark.parametrize("save", ["jpeg", "webp"])
def test_other_formats_have_the_same_pictures(pipe, rows, pictures_made, tmp_path, save):
    bulk.run(pipe, rows, tmp_path / "out", save=save, **SIZES, **SETTINGS)
    for record, other in zip(records(tmp_path / "out"), records(pictures_made), strict=True):
        if other["file"]:
            want = io.BytesIO()
            with Image.open(pictures_made / other["file"]) as picture:
                picture.save(want, save, quality=95)
            assert (tmp_path / "out" / record["file"]).read_bytes() == want.getvalue()


def test_embeddings_are_those_of_the_encoder(pipe, rows, tmp_path):
    bulk.run(pipe, rows, tmp_path / "out", save="image_embeds", **SIZES, **SETTINGS)
    for record in records(tmp_path / "out"):
        if record["file"]:
            images = [photo(int(one["name"][0])) for one in record["recipe"]["images"]]
            got = np.load(tmp_path / "out" / record["file"])
            np.testing.assert_allclose(got.reshape(len(images), -1), pipe.encode_image_embeds(images), atol=1e-5)


def test_another_job_or_input_is_refused_by_name(pipe, rows, undisturbed, tmp_path):
    out, _ = undisturbed
    same = {"save": "latents", **SIZES, **SETTINGS}
    for change, words in (
        ({"guidance_scale": 2.0}, "settings is"),
        ({"save": "png"}, "save is 'latents' there, and 'png' here"),
        ({"part_size": 7}, "part_size is 6 there, and 7 here"),
    ):
        with pytest.raises(ValueError, match=f"holds another job: {words}"):
            bulk.run(pipe, rows, out, **{**same, **change})
    before = rows.read_text()
    try:
        rows.write_text(before.replace('"row 9"', '"row nine"'))
        with pytest.raises(ValueError, match="another input: rows 6 to 9 are not those"):
            bulk.run(pipe, rows, out, **same)
    finally:
        rows.write_text(before)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds mine\.txt and no job\.json"):
        bulk.run(pipe, rows, tmp_path, **same)


def test_too_many_failures_stop_a_job_which_then_goes_on(pipe, rows, tmp_path):
    same = {"save": "latents", **SIZES, **SETTINGS}
    with pytest.raises(
        ValueError, match=r"1 rows failed, and max_errors is 0; the last: row 3: ValueError: image: not an image"
    ):
        bulk.run(pipe, rows, tmp_path / "out", max_errors=0, **same)
    assert bulk.run(pipe, rows, tmp_path / "out", max_errors=1, **same).failed == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"save": "gif"}, "save is 'gif'; accepted: png"),
        ({"batch_size": 0}, "batch_size is 0; want an integer from 1"),
        ({"part_size": True}, "part_size is True"),
        ({"steps": 3}, "steps: no argument of UnCLIPPipeline"),
        ({"output_type": "np"}, "output_type: no argument"),
        ({"names": {"caption": "title"}}, "names: title: no argument"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(pipe, rows, tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        bulk.run(pipe, rows, tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()
