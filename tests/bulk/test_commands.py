"""`unclip-jax COMMAND --from INPUT` as a user runs it: what is refused in one line, what is printed and written."""

import io
import json
import os
import sys
import warnings

import pytest
from PIL import Image

from tests.bulk.job_files import files, records
from tests.pipelines.small_family import photo
from unclip_jax import cli


@pytest.fixture(autouse=True)
def quiet_warnings(monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main() replaces it


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("variations photo.png --from rows.jsonl", "give IMAGEs or --from INPUT, got both"),
        ("variations", "give IMAGEs or --from INPUT, got neither"),
        ("text-to-image a-cat --from rows.jsonl", "give PROMPTs or --from INPUT, got both"),
        ("text-to-image", "give PROMPTs or --from INPUT, got neither"),
        ("variations --from rows.jsonl --weights 1 2", "--weights is each row's own: make it a column of rows.jsonl"),
        ("variations --from rows.jsonl --noise-level 1 2", "--noise-level has several values; with --from it is one"),
        ("variations --from rows.jsonl --columns text_en", "--columns text_en: want COLUMN=ARGUMENT"),
        ("variations --from rows.jsonl --columns =prompt", "--columns =prompt: want COLUMN=ARGUMENT"),
        ("variations --from rows.jsonl --out photo.png", "--out photo.png is a file; want a directory"),
    ],
)
def test_bad_usage_is_refused_without_a_model(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo()).save("photo.png")
    assert cli.main([*arguments.split(), "--model", "none"]) == 2
    assert words in one_line(capsys)
    assert os.listdir() == ["photo.png"]


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


@pytest.fixture
def job(family_folder, tmp_path, monkeypatch):
    """Runs a job of three rows, the second of which cannot be made, with more arguments; its exit status."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo()).save("photo.png")
    rows = [{"image": "photo.png", "title": "a cat"}, {"image": "none.png"}, {"image": "photo.png", "seed": 7}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = "--devices 1 --height 20 --width 24 --scheduler ddim --steps 2 --batch-size 2 --columns title=prompt"

    def run(*arguments):
        return cli.main(["variations", *arguments, "--model", str(family_folder("SMALL")), *options.split()])

    return run


@pytest.mark.e2e
def test_a_job_tells_what_it_has_come_to(job, tmp_path, capsys):
    assert job("--from", "rows.jsonl", "--out", "out") == 0
    said = capsys.readouterr()
    first, second = said.out.splitlines()
    assert first == "3 rows: 2 images, 1 rows failed"
    assert second.startswith("2 images made now, in ")
    assert said.err == "1 rows failed: out/manifest has the reasons\n"
    assert [record["status"] for record in records(tmp_path / "out")] == ["made", "failed", "made"]
    assert records(tmp_path / "out")[0]["recipe"]["prompt"] == "a cat"


@pytest.mark.e2e
def test_a_dry_run_counts_and_writes_nothing(job, tmp_path, capsys):
    before = sorted(os.listdir())
    assert job("--from", "rows.jsonl", "--out", "out", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("3 rows in ")
    assert lines[0].endswith("; 1 of the first 3 cannot be made")
    assert lines[1].startswith("row 1: FileNotFoundError: ")
    assert lines[2] == "about 2 images, 1 of a row; 2.0 rows in a batch of 2"
    assert lines[3].startswith("a batch takes ")
    assert sorted(os.listdir()) == before


@pytest.mark.e2e
def test_rows_of_standard_input_make_the_same_files(job, tmp_path, monkeypatch):
    assert job("--from", "rows.jsonl", "--out", "named") == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO((tmp_path / "rows.jsonl").read_text()))
    assert job("--from", "-", "--out", "piped") == 0
    named, piped = files(tmp_path / "named"), files(tmp_path / "piped")
    assert {name for name in named | piped if named.get(name) != piped.get(name)} == {"job.json"}


@pytest.mark.e2e
def test_a_strict_job_stops_at_the_first_failure_and_goes_on(job, tmp_path, capsys):
    assert job("--from", "rows.jsonl", "--out", "out", "--strict") == 2
    assert "1 rows failed, and max_errors is 0; the last: row 1: FileNotFoundError" in one_line(capsys)
    assert job("--from", "rows.jsonl", "--out", "out", "--max-errors", "1") == 0
    assert [record["status"] for record in records(tmp_path / "out")] == ["made", "failed", "made"]
