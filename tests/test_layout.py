"""How the tests are laid out."""

import ast
from pathlib import Path

TESTS = Path(__file__).parent


def imports(path):
    """The dotted names of everything that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            root = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            yield from (f"{root}{alias.name}" for alias in node.names)


def test_no_module_of_tests_imports_another():
    """What they share is in modules of helpers, which can be read, and changed, without the tests of others."""
    for path in TESTS.rglob("*.py"):
        for name in imports(path):
            assert not (name.startswith("tests.") and ".test_" in name), (path, name)


def test_torch_is_imported_by_live_comparisons_alone():
    for path in TESTS.rglob("test_*.py"):
        if not path.name.endswith("_parity.py"):
            assert "torch" not in {name.partition(".")[0] for name in imports(path)}, path
