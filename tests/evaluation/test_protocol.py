"""An evaluation as a whole on a small model: resumable, independent of batches, and its report."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from unclip_jax.checkpoints.source import open_checkpoint
from unclip_jax.cli import main
from unclip_jax.distributed.mesh import local_mesh
from unclip_jax.evaluation import protocol as protocols
from unclip_jax.evaluation.features import clip_features
from unclip_jax.evaluation.protocol import Judges, Protocol, coco_captions, evaluate
from unclip_jax.pipelines.unclip import UnCLIPPipeline
from unclip_jax.training.data import image_folder

SHORT = Protocol((1.5, 4.0), (0, 1000), steps=2, variations=2, batch_size=4)


def coarse(made):
    """In Inception's place."""
    return np.stack(made)[:, ::8, ::8, 0].reshape(len(made), -1) / 255


@pytest.fixture(scope="module")
def judged(small_model):
    mesh = local_mesh()
    pipe = UnCLIPPipeline.from_pretrained(small_model, mesh=mesh)
    pipe.progress = False
    with open_checkpoint(small_model) as checkpoint:
        return pipe, Judges(("small", "coarse"), clip_features(checkpoint, mesh), coarse)


def rounded(result):
    return json.loads(json.dumps(result), parse_float=lambda text: round(float(text), 4))


@pytest.mark.e2e
def test_an_evaluation_goes_on_where_it_was(judged, pictures, tmp_path, monkeypatch):
    pipe, judges = judged
    records = image_folder(pictures)[:6]
    whole = evaluate("small", pipe, records, judges, SHORT, tmp_path / "whole")
    assert [row["guidance_scale"] for row in whole["guidance"]] == [1.5, 4.0]
    assert {"fid", "clip_fid", "cmmd", "clip_score", "retention"} <= whole["guidance"][0].keys()
    kept = {row["noise_level"]: row["retention"] for row in whole["by_noise_level"]}
    assert kept.keys() == {0, 1000}
    assert all(0 <= row["diversity"] <= 2 for row in whole["by_noise_level"])

    write, calls = protocols._States.write, []

    def interrupt(self, name, counts):
        write(self, name, counts)
        calls.append(name)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(protocols._States, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            evaluate("small", pipe, records, judges, SHORT, tmp_path / "parts")
    again = evaluate("small", pipe, records, judges, SHORT, tmp_path / "parts")
    assert again == whole
    monkeypatch.setattr(protocols._States, "write", lambda *args: pytest.fail("counted twice"))
    assert evaluate("small", pipe, records, judges, SHORT, tmp_path / "parts") == whole


def test_other_judges_count_anew(judged, pictures, tmp_path):
    pipe, judges = judged
    blind = dataclasses.replace(judges, names=("blind",), inception=None)
    short = Protocol((2.0,), (300,), steps=2, variations=2)
    records = image_folder(pictures)[:4]
    assert "fid" not in evaluate("small", pipe, records, blind, short, tmp_path)["guidance"][0]
    assert "fid" in evaluate("small", pipe, records, judges, short, tmp_path)["guidance"][0]


@pytest.mark.e2e
def test_batches_make_no_difference(judged, pictures, tmp_path):
    pipe, judges = judged
    records = image_folder(pictures)[:5]
    short = Protocol((2.0,), (300,), steps=2, variations=2)
    results = [
        evaluate("small", pipe, records, judges, dataclasses.replace(short, batch_size=size), tmp_path / str(size))
        for size in (2, 5)
    ]
    assert rounded(results[0]) == rounded(results[1])


def test_the_command_writes_a_report(small_model, pictures, tmp_path, capsys):
    command = ["evaluate", str(small_model), "--images", str(pictures), "--out", str(tmp_path)]
    options = "--count 3 --steps 2 --guidance-scale 2 5 --noise-levels 0 999 --variations 2"
    assert main([*command, *options.split()]) == 0
    written = capsys.readouterr().out.split()
    assert [name.rsplit("/")[-1] for name in written] == [
        "results.json",
        "results.md",
        "pareto.png",
        "noise-levels.png",
    ]
    assert "| guidance | CLIP-FID | CMMD | CLIP score | retention |" in (tmp_path / "results.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text())[0]["count"] == 3
    for name in ("pareto.png", "noise-levels.png"):
        assert np.asarray(Image.open(tmp_path / name).convert("L")).std() > 10
    assert main([*command, "--count", "99"]) == 2
    assert "--count 99: want 2 to 16" in capsys.readouterr().err


def test_coco_captions(tmp_path):
    data = {
        "images": [
            {"id": 9, "file_name": "b.jpg"},
            {"id": 3, "file_name": "a.jpg"},
            {"id": 4, "file_name": "none.jpg"},
        ],
        "annotations": [
            {"id": 7, "image_id": 9, "caption": "second of b"},
            {"id": 2, "image_id": 9, "caption": " first of b "},
            {"id": 5, "image_id": 3, "caption": "of a"},
        ],
    }
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(data))
    found = coco_captions(path, tmp_path)
    assert [(record.path.name, record.text) for record in found] == [("a.jpg", "of a"), ("b.jpg", "first of b")]
    data["images"][0]["file_name"] = "../b.jpg"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="outside the folder"):
        coco_captions(path, tmp_path)
    for text in ("[]", "{", '{"images": 3}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="not COCO's captions"):
            coco_captions(path, tmp_path)
    with pytest.raises(FileNotFoundError):
        coco_captions(tmp_path / "none.json", tmp_path)
