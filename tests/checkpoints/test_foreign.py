"""The one door to `convert`: there is no second, and it is shut, in one line, where another module hides ours."""

import ast
import subprocess
import sys
import types
from pathlib import Path

import pytest

import unclip_jax
from unclip_jax.checkpoints import foreign
from unclip_jax.training.run import RunOptions
from unclip_jax.training.settings import DataSettings, TrainSettings
from unclip_jax.training.tasks import TASKS

PACKAGE = Path(unclip_jax.__file__).parent
PHOTO = PACKAGE.parent / "docs" / "images" / "coffee.jpg"
THEIRS = "print('ran')\n"
# What imports a module by its name.
BY_NAME = ("import_module", "__import__", "find_spec", "run_module", "resolve_name")


def modules_named(tree: ast.AST) -> list[str]:
    """Every module that a file imports, by a statement or by a name in a string."""
    named = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            named.append("." * node.level + (node.module or ""))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in BY_NAME:
            named += [
                part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and type(part.value) is str
            ]
    return named


def test_no_other_module_imports_convert():
    doors = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(name.partition(".")[0] == "convert" for name in modules_named(ast.parse(path.read_text("utf-8"))))
    }
    assert doors == {"checkpoints/foreign.py"}


@pytest.mark.parametrize(
    "statement",
    [
        "import convert",
        "import convert.clip as c",
        "def f():\n    from convert import clip",
        "from convert.clip import is_clip",
        "importlib.import_module('convert.clip')",
        "import_module(f'convert.{x}')",
        "__import__('convert')",
    ],
)
def test_an_import_of_convert_is_seen(statement):
    assert any(name.partition(".")[0] == "convert" for name in modules_named(ast.parse(statement)))


@pytest.mark.parametrize("door", ["python", "variations", "convert"])
def test_a_script_of_that_name_is_told_of_and_not_run(tmp_path, original, door):
    file, hidden = str(original[0]), tmp_path / "convert.py"
    hidden.write_text(THEIRS)
    (tmp_path / "mine.py").write_text(f"import unclip_jax\nunclip_jax.from_pretrained({file!r})\n")
    command = {
        "python": ["mine.py"],
        "variations": ["-m", "unclip_jax.cli", "variations", str(PHOTO), "--model", file],
        "convert": ["-m", "unclip_jax.cli", "convert", file, "out"],
    }[door]
    ran = run(tmp_path, command)
    *_, last = ran.stderr.splitlines()
    assert last.endswith(
        f"another module called convert hides the one that comes with unclip_jax: {hidden}; rename it or run elsewhere"
    )
    assert "ran" not in ran.stdout
    if door == "python":
        assert (ran.returncode, last.partition(":")[0]) == (1, "ImportError")
    else:
        assert (ran.returncode, ran.stderr.count("\n"), last.partition(":")[0]) == (2, 1, "unclip-jax")


def test_the_installed_program_does_not_look_in_the_working_directory(tmp_path):
    (tmp_path / "convert.py").write_text(THEIRS)
    ran = run(tmp_path, ["-P", "-m", "unclip_jax.cli", "convert", "--help"])  # -P: the path as it is for a program
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith("usage: unclip-jax convert ")


def run(folder: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={"PATH": "", "PYTHONPATH": str(PACKAGE.parent), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def unloaded(monkeypatch):
    """As before the first import of `convert`."""
    monkeypatch.delitem(sys.modules, "convert")


def test_ours_is_let_through(unloaded, monkeypatch, tmp_path):
    foreign.require_convert()
    assert "convert" not in sys.modules  # looked for, not run
    # Installers that link to their cache: the same folder by another path.
    (tmp_path / "linked").symlink_to(foreign.OURS)
    monkeypatch.setattr(foreign, "OURS", tmp_path / "linked")
    foreign.require_convert()


def test_ours_is_let_through_once_it_is_loaded():
    import convert

    assert convert.__file__ is not None
    foreign.require_convert()


@pytest.mark.parametrize("name", ["convert.py", "convert/__init__.py"])
@pytest.mark.parametrize("loaded", [False, True])
def test_whatever_hides_it_is_named(name, loaded, unloaded, monkeypatch, tmp_path):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("")
    if loaded:
        theirs = types.ModuleType("convert")
        theirs.__file__ = str(file)
        monkeypatch.setitem(sys.modules, "convert", theirs)
    else:
        monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError) as caught:
        foreign.require_convert()
    assert f": {file}; rename it or run elsewhere" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_package_hides_nothing(unloaded, monkeypatch, tmp_path):
    (tmp_path / "convert").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    foreign.require_convert()


@pytest.mark.parametrize("task", ["lora", "textual-inversion"])
def test_training_is_refused_before_it_begins(task, unloaded, monkeypatch, tmp_path):
    (tmp_path / "convert.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    settings = TrainSettings(task, "/none", str(tmp_path), DataSettings(str(tmp_path)), RunOptions(total_steps=1))
    with pytest.raises(ImportError, match="hides the one that comes with unclip_jax"):
        TASKS[task](settings, False)


def test_our_own_format_needs_no_converter(unloaded, monkeypatch, tmp_path):
    from unclip_jax.checkpoints.source import open_checkpoint

    (tmp_path / "convert.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with open_checkpoint() as checkpoint:
        assert checkpoint.params
