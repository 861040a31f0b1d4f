"""Every block of code in the README runs as it is written; one that needs PyTorch in test_readme_parity.py."""

import re
import sys
import warnings

import jax
import numpy as np
import pytest
from PIL import Image

from tests import readme


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return readme.like_a_clone(tmp_path_factory.mktemp("clone"))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return readme.published(tmp_path_factory.mktemp("published"))


@pytest.fixture
def restored(monkeypatch, clone, published, hub_server):
    hub_server.repos |= {name: {"main": files} for name, files in published.items()}
    monkeypatch.chdir(clone)
    monkeypatch.setattr(sys, "argv", sys.argv)
    # A reader has one device; four would make three copies of every image to be thrown away.
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


def test_its_first_two_commands_are_run_by_ci():
    """They make an environment each: .ci/run runs them."""
    (language, text), *rest = readme.blocks()
    assert language == ""
    assert all(language for language, _ in rest)
    assert re.findall(r"^python3 (\S+)", text, re.MULTILINE) == ["scripts/quickstart", "scripts/test"]
    assert all(
        f'"$python" {script}' in (readme.ROOT / ".ci/run").read_text() for script in re.findall(r"scripts/\w+", text)
    )


HERE = [block for block in readme.blocks()[1:] if not readme.needs_torch(block[1])]


@pytest.mark.e2e
@pytest.mark.usefixtures("fully_compiled")  # the images have published sizes: making them takes longer than compiling
@pytest.mark.parametrize("block", HERE, ids=[text.split("\n")[0][:40] for _, text in HERE])
def test_a_block_runs_and_what_it_draws_is_not_blank(block, restored, clone):
    before = set(clone.rglob("*.png"))
    readme.run(*block)
    made = set(clone.rglob("*.png")) - before
    assert made or (block[0] == "python" and ".save(" not in block[1])
    assert all(np.asarray(Image.open(path)).std() > 5 for path in made)


def test_the_files_it_names_are_there():
    text = (readme.ROOT / "README.md").read_text("utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)?", text):
        assert (readme.ROOT / target).exists(), target
    for script in re.findall(r"`(scripts/[\w/]+)(?: \w+)?`", text):
        assert (readme.ROOT / script).exists() or script.startswith("scripts/streamlit"), script
