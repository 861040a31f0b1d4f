"""docs/architecture.md, held by the code: who may import whom, the size of classes and files, the public names."""

import ast
from pathlib import Path

import pytest

import unclip_jax

ROOT = Path(unclip_jax.__file__).parent
LEVELS = [
    {"cli", "cli_bulk", "cli_controlnet", "cli_estimate", "cli_generate"},
    {"training", "evaluation", "bulk"},
    {"pipelines"},
    {"adapters", "safety", "image_files"},
    {"checkpoints", "executables"},
    {"estimation"},
    {"conditioning", "distributed"},
    {"models", "sampling"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def imports(file):
    """The modules of ours that a file imports outside of `if TYPE_CHECKING`."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("unclip_jax."):
            yield node.module
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("unclip_jax."))


def test_imports_go_down():
    wrong = []
    for file in ROOT.rglob("*.py"):
        own = file.relative_to(ROOT).parts[0].removesuffix(".py")
        for module in imports(file):
            other = module.split(".")[1]
            up = LEVEL.get(other, len(LEVELS)) < LEVEL.get(own, len(LEVELS))
            if up and own != "__init__":
                wrong.append(f"{file.relative_to(ROOT)} imports {module}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("file", sorted((ROOT / "pipelines").glob("*.py")), ids=lambda file: file.name)
def test_files_of_pipelines_are_short(file):
    assert len(file.read_text().splitlines()) <= (200 if file.name == "pipeline.py" else 350)


def test_classes_have_few_public_methods():
    for file in [*ROOT.rglob("*.py"), *(ROOT.parent / "convert").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                methods = [n.name for n in node.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]
                assert len(methods) <= 15, (file.name, node.name)
