"""What .ci/run relies on: a notebook that raises or shows a blank image fails, and a committed one is its text's."""

import importlib.machinery
import importlib.util
from pathlib import Path

import jupytext
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.py"))
HEAD = "# ---\n# jupyter:\n#   jupytext:\n#     formats: ipynb,py:percent\n# ---\n\n"
IMAGE = """# %%
import numpy as np
from IPython.display import display
from PIL import Image

display(Image.fromarray(np.{values}))
"""


@pytest.fixture
def runner(tmp_path, monkeypatch):
    loader = importlib.machinery.SourceFileLoader("notebook_runner", str(ROOT / "scripts" / "notebooks"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("notebook_runner", loader))
    loader.exec_module(module)
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    return module


def test_there_are_nine_numbered_notebooks():
    assert [name[:2] for name in NAMES] == [f"0{n}" for n in range(1, 10)]


@pytest.mark.parametrize("name", NAMES)
def test_a_committed_notebook_has_the_cells_of_its_text_and_images(name, runner, monkeypatch):
    monkeypatch.setattr(runner, "FOLDER", ROOT / "notebooks")
    assert runner.cells_differ(name, jupytext.read(ROOT / "notebooks" / f"{name}.py")) == []
    kept = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    assert runner.outputs_wrong(kept) == []
    assert not [o for cell in kept.cells for o in cell.get("outputs", []) if o.output_type == "error"]


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (IMAGE.format(values="eye(64, dtype=np.uint8) * 255"), None),
        (IMAGE.format(values="full((64, 64), 127, np.uint8)"), "a blank image"),
        ("# %%\nraise ValueError('of its own')\n", "of its own"),
        ("# %%\nprint('\\n' * 99)\n" + IMAGE.format(values="eye(64, dtype=np.uint8) * 255"), "prints 100 lines"),
        ("# %%\n1 + 1\n", "there is no image"),
    ],
)
def test_a_notebook_that_is_wrong_is_refused_with_its_reason(body, problem, runner, tmp_path):
    (tmp_path / "made.py").write_text(HEAD + body)
    problems = runner.run("made", check=False)
    if problem is None:
        assert problems == []
        assert runner.run("made", check=True) == []
        (tmp_path / "made.py").write_text(HEAD + body + "\n# %%\n2\n")
        assert "other cells" in runner.run("made", check=True)[0]
    else:
        assert any(problem in found for found in problems)
