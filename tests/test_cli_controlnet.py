"""`--controlnet` as a user gives it: images, rows, and what is refused in one line."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.bulk.job_files import records
from tests.pipelines import small_controlnet
from tests.pipelines.small_family import photo
from unclip_jax import cli
from unclip_jax.checkpoints import directory
from unclip_jax.image_files import read_recipe


@pytest.fixture
def make(family_folder, tmp_path, monkeypatch):
    """Runs text-to-image with more arguments in a folder with a ControlNet, `net`, and two hints; its exit status."""
    monkeypatch.chdir(tmp_path)
    directory.save(small_controlnet.checkpoint(), tmp_path / "net")
    for number in (0, 1):
        Image.fromarray(photo(number)).save(f"hint-{number}.png")
    options = "--devices 1 --scheduler ddim --eta 1 --steps 3 --guidance-scale 4 --seed 3"

    def run(*arguments):
        model = str(family_folder("TEXT_TO_IMAGE"))
        return cli.main(["text-to-image", *arguments, "--model", model, *options.split()])

    return run


@pytest.mark.e2e
def test_images_and_their_recipes(make, tmp_path, capsys):
    one = ("--controlnet", "net", "--control-image", "hint-0.png")
    assert make("a cat", *one, "--out", "one") == 0, capsys.readouterr().err
    two = ("--controlnet", "net", "net", "--control-image", "hint-0.png", "hint-1.png")
    scales = ("--controlnet-conditioning-scale", "0.5", "1", "--control-guidance-end", "0.7", "--guess-mode")
    assert make("a cat", *two, *scales, "--out", "two") == 0, capsys.readouterr().err
    first, second = (np.asarray(Image.open(tmp_path / name / "0001-000.png")) for name in ("one", "two"))
    assert first.shape == (20, 24, 3)  # the hint's size
    assert (first != second).any()
    recipe = read_recipe(tmp_path / "two" / "0001-000.png")
    assert recipe["controlnet"] == ["net", "net"]
    assert [hint["name"] for hint in recipe["control_image"]] == ["hint-0.png", "hint-1.png"]
    assert recipe["controlnet_conditioning_scale"] == [0.5, 1.0]
    assert recipe["control_guidance_end"] == 0.7
    assert recipe["guess_mode"] is True


@pytest.mark.e2e
def test_rows_have_their_own_hints(make, tmp_path, capsys):
    rows = [{"prompt": "a cat", "control_image": f"hint-{n % 2}.png"} for n in range(3)] + [{"prompt": "no hint"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = ("--from", "rows.jsonl", "--controlnet", "net", "--out", "out", "--batch-size", "2")
    assert make(*job) == 0, capsys.readouterr().err
    made = records(tmp_path / "out")
    assert [record["status"] for record in made] == ["made"] * 3 + ["failed"]
    assert "control_image is missing" in made[3]["reason"]
    assert make(*job) == 0  # it is through, and is known to be the same job


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("a-cat --controlnet net", "--controlnet needs --control-image"),
        ("a-cat --control-image hint-0.png", "--control-image has 1 files for 0 ControlNets"),
        ("a-cat --controlnet net net --control-image hint-0.png", "--control-image has 1 files for 2 ControlNets"),
        (
            "a-cat --controlnet net --control-image hint-0.png --control-guidance-end 0.1 0.2",
            "--control-guidance-end has 2 values for 1 ControlNets",
        ),
        ("--from rows.jsonl --controlnet net --engine ray", "--controlnet with --engine"),
        ("--from rows.jsonl --controlnet net --control-image hint-0.png", "--control-image is each row's own"),
        ("a-cat --controlnet net --control-image none.png", "no such file: none.png"),
    ],
)
def test_what_does_not_go_together_is_refused(make, arguments, words, capsys):
    assert make(*arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error
