"""Pages whose blocks take minutes. test_docs.py has the rest.

docs/bulk.md, docs/demo-model.md, docs/features.md and docs/guidance.md with the demo model, docs/editing.md too, in
fewer steps; docs/training.md and docs/evaluation.md with small models and settings of size that are smaller, and with
Inception as it is.
"""

import json
import subprocess
import sys
import types

import numpy as np
import pytest

from convert.engine import export_tensors
from convert.inception import abstract_inception, inception_rules
from convert.rules.clip import open_clip_model
from tests import readme, small_models, stand_ins
from tests.bulk.job_files import records
from tests.convert.clip_files import CONFIG, DESCRIPTION
from tests.docs import photo, run, without_installations
from unclip_jax.checkpoints.checkpoint import Parameter
from unclip_jax.checkpoints.networks import abstract_params

pytestmark = pytest.mark.e2e


def random(specs, seed=0):
    """Small numbers; means of squares (`variance`) are positive."""
    rng = np.random.default_rng(seed)
    arrays = {name: 0.1 * rng.standard_normal(spec.shape, np.float32) for name, spec in specs.items()}
    return {name: Parameter.of(np.abs(a) + 1 if name.endswith("variance") else a) for name, a in arrays.items()}


def foreign(rules, params):
    return {name: value.read() for name, value in export_tensors(rules, params).items()}


def test_bulk(desk):
    """The shell makes the inputs; the commands come after them."""
    for language, text in readme.blocks("docs/bulk.md"):
        if language == "python":
            names = {}
            readme.run(language, text, names, "docs/bulk.md")
            assert (names["summary"].images, names["summary"].failed) == (len(list(desk.glob("outputs/bulk/*"))), 0)
            continue
        commands = [line for line in text.splitlines() if line.startswith("unclip-jax ")]
        inputs = "\n".join(line for line in text.splitlines() if line not in commands)
        subprocess.run(["bash", "-c", inputs], check=True)
        readme.run(language, "\n".join(commands))
    statuses = [record["status"] for record in records(desk / "outputs" / "rows")]
    assert statuses == ["made", "made", "failed"]
    assert len(list(desk.glob("outputs/variations/files/*/*.png"))) == len(list(desk.glob("outputs/bulk/*")))


def test_demo_model(desk):
    run("demo-model")
    assert len(list((desk / "variations").glob("*-sheet.png"))) == 2


def test_guidance(desk):
    """The other block: test_docs.py."""
    run("guidance", only=0)


def test_training(desk, hub_server, tmp_path_factory):
    """Of the settings, those of size are smaller, and one report goes to a service."""
    (name,) = [name for name in stand_ins.HUB if name.endswith("unclip")]
    hub_server.repos[name] = {"main": stand_ins.repositories(tmp_path_factory.mktemp("hub"), [name])[name]}
    shell, whole, *_ = readme.blocks("docs/training.md")
    (desk / "settings.yaml").write_text(whole[1])
    for folder in ("cats", "cats-held-out"):
        (desk / folder).mkdir()
        rows = [{"file_name": f"{i}.png", "text": "a cat", "aesthetic": 4 + i, "p_unsafe": 0.01} for i in range(16)]
        (desk / folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        for row in rows:
            photo(desk / folder / row["file_name"])
    smaller = ("data.resolution=16", "run.total_steps=2", "run.sample_every=2", "reports=[tensorboard]")
    readme.run("shell", without_installations(shell[1]), options=" ".join(f"--set {change}" for change in smaller))
    assert (desk / "runs" / "cats" / "model" / "config.json").is_file()
    assert list((desk / "runs" / "cats" / "samples").iterdir())


def test_training_in_your_own_code():
    language, text = readme.blocks("docs/training.md")[-1]
    names = {}
    readme.run(language, text, names, "docs/training.md")
    # A prediction of zero has a loss of about 1. Measured: 1.01 and 0.77.
    assert np.mean(names["history"][-10:]) < 0.85 * np.mean(names["history"][:3])


def test_features(desk):
    names = run("features")
    assert names["likeness"].shape == (8, 8)
    assert max(abs(np.subtract(names["found"], (1, 2)))) <= 1  # both apples have their leaf there


def test_editing(desk):
    names = {}
    for language, text in readme.blocks("docs/editing.md"):
        fewer = text.replace('inference_steps": 20', 'inference_steps": 4').replace("steps = 100", "steps = 4")
        readme.run(language, fewer, names, "docs/editing.md")
    made = {"line": 7, "grid": 25, "edits": 6, "kept": 6, "sweep": 6, "started": 8, "filled": 4}
    for name, count in made.items():
        assert len(names[name]) == count
        assert all(np.asarray(picture).std() > 5 for picture in names[name]), name
    assert np.isfinite(names["latents_error"])


def test_evaluation(desk, monkeypatch):
    for name in ("model-a", "model-b"):
        small_models.write(small_models.SMALL, desk / name)
    (desk / "val2017").mkdir()
    described = {"images": [], "annotations": []}
    for number in range(4):
        photo(desk / "val2017" / f"{number}.jpg")
        described["images"].append({"id": number, "file_name": f"{number}.jpg"})
        described["annotations"].append({"id": number, "image_id": number, "caption": "a thing"})
    (desk / "captions_val2017.json").write_text(json.dumps(described))
    clip = random(abstract_params(CONFIG))
    stand_ins.write_torch(desk / "clip.bin", foreign(open_clip_model(CONFIG, clip).rules, clip))
    network = abstract_inception()
    weights = foreign(inception_rules(network.params), random(network.params))
    stand_ins.write_torch(desk / "pt_inception-2015-12-05-6726825d.pth", weights)
    # What open_clip says of the name, and where it has put the weights.
    library = types.ModuleType("open_clip")
    library.get_model_config = {"ViT-H-14": DESCRIPTION}.get
    library.get_pretrained_cfg = lambda architecture, tag: {"tag": tag} if tag == "laion2b_s32b_b79k" else None
    library.download_pretrained = lambda published: desk / "clip.bin"
    monkeypatch.setitem(sys.modules, "open_clip", library)
    ((_, text),) = readme.blocks("docs/evaluation.md")
    smaller = "--count 3 --steps 2 --guidance-scale 2 --noise-levels 0 --variations 2 --batch-size 4"
    readme.run("shell", without_installations(text), options=smaller)
    results = json.loads((desk / "evaluation" / "results.json").read_text())
    assert [result["count"] for result in results] == [3, 3]
    assert all(np.isfinite(row["fid"]) for result in results for row in result["guidance"])
