"""The public names: those that CHANGELOG lists, with docstrings that name their arguments."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHANGELOG = (Path(__file__).parents[1] / "CHANGELOG.md").read_text("utf-8")
PARTS = (
    *("adapters", "bulk", "checkpoints", "conditioning", "distributed", "evaluation", "models"),
    *("pipelines", "sampling", "training"),
)
PACKAGES = ("unclip_jax", "convert", *(f"unclip_jax.{name}" for name in PARTS))


def listed():
    """Package -> its names, in the newest list of CHANGELOG."""
    text = CHANGELOG.split("### Public names")[1].split("###")[0]
    entries = re.findall(r"^- `([\w.]+)`: (.*?)(?=^- |\Z)", text, re.MULTILINE | re.DOTALL)
    return {package: set(re.findall(r"`(\w+)`", names)) for package, names in entries}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_public_names_are_those_that_the_changelog_lists(package):
    module = importlib.import_module(package)
    names = {name for name in module.__all__ if not inspect.ismodule(getattr(module, name))}
    assert names == listed()[package], "a change of the interface needs its line in CHANGELOG.md"
    assert set(module.__all__) <= set(dir(module))


def test_packages_are_there_after_a_plain_import():
    code = "import unclip_jax; unclip_jax.sampling.make_solver, unclip_jax.models.UNet; print(dir(unclip_jax))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'UnCLIPPipeline'" in shown
    assert "'sampling'" in shown


def public():
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value) or inspect.isclass(value):
                yield pytest.param(value, id=f"{package}.{name}")


@pytest.mark.parametrize("value", [*public()])
def test_a_public_name_is_documented_with_its_arguments(value):
    text = inspect.getdoc(value)
    assert text
    call = value.__init__ if inspect.isclass(value) else value
    own = [name for name in inspect.signature(call).parameters if name not in ("self", "args", "kwargs", "rngs")]
    missing = [name for name in own if not re.search(rf"\b{name}\b", text + (inspect.getdoc(call) or ""))]
    assert not missing or len(own) == 1, f"{value.__name__}: {missing}"


@pytest.mark.parametrize("value", [*public()])
def test_a_public_function_of_several_arguments_lists_them(value):
    if inspect.isfunction(value) and len(inspect.signature(value).parameters) > 2:
        assert "Args:\n" in inspect.getdoc(value)
