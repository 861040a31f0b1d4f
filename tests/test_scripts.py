"""The scripts' set-up, with a stand-in for the environment's Python so that nothing is installed; generated pages."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import environment
import versions

SCRIPTS = Path(__file__).parents[1] / "scripts"

PIP_WORKS = r"""
Collecting jaxlib
  Downloading jaxlib-0.10.2-cp311-cp311-manylinux_2_27_x86_64.whl (80.1 MB)
  Downloading small-1.0-py3-none-any.whl (12 kB)
Installing collected packages: numpy, jaxlib, unclip-jax
"""
OFFLINE = """
WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError(...)': /simple/hatchling/
ERROR: No matching distribution found for hatchling
"""
REFUSED = """
ERROR: Could not find a version that satisfies the requirement jax>=99
ERROR: No matching distribution found for jax>=99
"""


@pytest.fixture
def fake_python(tmp_path, monkeypatch):
    """Makes tmp_path a virtual environment whose pip prints `output`; returns the list of its pip calls."""

    def make(output: str, status: int = 0):
        python = tmp_path / "venv" / "bin" / "python"
        python.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "output").write_text(output)
        calls = tmp_path / "calls"
        calls.touch()
        python.write_text(
            f'#!/bin/sh\n[ "$1" = -c ] && exit 0\necho "$@" >>{calls}\ncat {tmp_path / "output"}\nexit {status}\n'
        )
        python.chmod(0o755)
        monkeypatch.setenv("UNCLIP_JAX_VENV", str(tmp_path / "venv"))
        return lambda: calls.read_text().splitlines()

    return make


def test_installs_once_and_again_only_for_another_extra(fake_python, capsys):
    calls = fake_python(PIP_WORKS)
    for extras in ([], [], ["dev"], [], ["dev"], ["dev", "parity"], ["parity"], []):
        environment.prepare(extras)
    assert [call.split()[-1] for call in calls()] == [
        str(environment.ROOT),
        f"{environment.ROOT}[dev]",
        f"{environment.ROOT}[dev,parity]",
    ]
    printed = capsys.readouterr().out
    assert "  downloading jaxlib, 80.1 MB\n  unpacking 3 packages\n" in printed
    assert "small" not in printed


def test_installs_again_when_pyproject_changes(fake_python, tmp_path, monkeypatch):
    calls = fake_python(PIP_WORKS)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    for text in ("a", "a", "b"):
        (tmp_path / "pyproject.toml").write_text(text)
        environment.prepare()
    assert len(calls()) == 2


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (OFFLINE, "pip cannot reach the package index"),
        (REFUSED, "pip install failed: ERROR: No matching distribution found for jax>=99"),
        ("ERROR: [Errno 28] No space left on device", "the disk is full"),
        ("", "pip install failed: no message"),
    ],
)
def test_a_failed_installation_is_one_line_and_is_tried_again(fake_python, output, message):
    calls = fake_python(output, status=1)
    for _ in range(2):
        with pytest.raises(environment.SetupError) as error:
            environment.prepare()
        assert str(error.value).startswith(message)
        assert "\n" not in str(error.value)
    assert len(calls()) == 2


def test_an_old_python_is_refused(monkeypatch):
    monkeypatch.setattr(environment.sys, "version_info", (3, 10, 4, "final", 0))
    with pytest.raises(environment.SetupError, match=r"^Python 3\.11 or newer is needed; \S+ is Python 3\.10\.4$"):
        environment.prepare()


def test_the_oldest_versions_are_the_lower_bounds_of_what_users_install():
    pyproject = """
        [project]
        dependencies = ["jax>=0.10,!=0.10.2", "orbax-checkpoint>=0.11.17"]
        optional-dependencies = {train = ["grain>=0.2.12"], parity = ["torchvision"], dev = ["ruff>=0.15"]}
    """
    assert versions.lower_bounds(pyproject) == ["grain==0.2.12", "jax==0.10", "orbax-checkpoint==0.11.17"]


def test_the_oldest_versions_are_installed_beside_the_usual_environment(fake_python, tmp_path, monkeypatch):
    calls = fake_python(PIP_WORKS)
    (tmp_path / "venv").rename(tmp_path / "venv-oldest")
    monkeypatch.setattr(versions.sys, "version_info", (3, 11, 7, "final", 0))
    assert versions.prepare_oldest(["dev"]) == tmp_path / "venv-oldest" / "bin" / "python"
    constraints = Path(calls()[0].split("--constraint ")[1])
    assert "numpy==2" in constraints.read_text().splitlines()


def test_the_oldest_versions_need_the_oldest_python(monkeypatch):
    monkeypatch.setattr(versions.sys, "version_info", (3, 13, 0, "final", 0))
    with pytest.raises(environment.SetupError, match=r"^--oldest needs Python 3\.11, .*; \S+ is Python 3\.13$"):
        versions.prepare_oldest(["dev"])


@pytest.fixture
def fake_unshare(tmp_path, monkeypatch):
    """An `unshare` that prints its arguments and ends with `status`, for root, who has debootstrap."""

    def make(status: int = 0):
        unshare = tmp_path / "bin" / "unshare"
        unshare.parent.mkdir()
        unshare.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path / "calls"}\necho "no permission"\nexit {status}\n')
        unshare.chmod(0o755)
        unshare.with_name("debootstrap").symlink_to(unshare)
        monkeypatch.setenv("PATH", str(unshare.parent), prepend=":")
        monkeypatch.setenv("UNCLIP_JAX_VENV", str(tmp_path / "venv"))
        monkeypatch.setattr(versions.os, "geteuid", lambda: 0)
        return lambda: (tmp_path / "calls").read_text()

    return make


def test_the_newest_versions_are_installed_anew_in_a_root_of_debian(fake_unshare, tmp_path):
    calls = fake_unshare()
    (tmp_path / "venv-newest" / "venv").mkdir(parents=True)
    for folder in ("etc/ssl/certs", "checkout"):
        (tmp_path / "venv-newest" / folder).mkdir(parents=True)
    assert versions.run_newest(["tests/test_purity.py", "-x"]) == 0
    assert calls().endswith("python3 /checkout/scripts/test tests/test_purity.py -x\n")
    assert "debootstrap" not in calls()
    assert not (tmp_path / "venv-newest" / "venv").exists()


def test_a_root_of_debian_is_there_when_it_is_whole(fake_unshare, tmp_path, monkeypatch):
    fake_unshare()
    monkeypatch.setattr(versions, "_check_rights", lambda: None)
    (tmp_path / "bin" / "unshare").write_text("#!/bin/sh\necho no such mirror\nexit 1\n")
    with pytest.raises(environment.SetupError, match=r"^debootstrap cannot make \S+venv-newest: no such mirror$"):
        versions.run_newest([])
    assert not (tmp_path / "venv-newest").exists()


def test_the_newest_versions_are_refused_where_nothing_can_be_mounted(fake_unshare):
    fake_unshare(status=1)
    with pytest.raises(environment.SetupError, match=r"^--newest mounts folders .* not allowed here: no permission$"):
        versions.run_newest([])


def test_the_newest_versions_are_refused_to_all_but_root(monkeypatch):
    monkeypatch.setattr(versions.os, "geteuid", lambda: 1000)
    with pytest.raises(environment.SetupError, match="it needs Linux and root"):
        versions.run_newest([])


@pytest.mark.parametrize("script", ["quickstart", "test"])
def test_a_folder_that_is_no_environment_is_left_alone(tmp_path, script):
    keep = tmp_path / "thesis.tex"
    keep.touch()
    run = subprocess.run(
        [sys.executable, SCRIPTS / script],
        env={"UNCLIP_JAX_VENV": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert run.stderr.startswith(f"scripts/{script}: {tmp_path} is there and is no virtual environment")
    assert run.stderr.count("\n") == 1
    assert keep.exists()


@pytest.mark.parametrize(
    "script", ["quickstart", "test", "make_random_checkpoint", "demo/drawings", "demo/train", "demo/report"]
)
def test_every_script_answers_help(script):
    run = subprocess.run([sys.executable, SCRIPTS / script, "--help"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert script in run.stdout


def test_the_page_on_formats_is_up_to_date():
    """`scripts/formats_page` writes it from the rule tables."""
    page = runpy.run_path(str(SCRIPTS / "formats_page"))["page"]()
    assert (SCRIPTS.parent / "docs" / "formats.md").read_text("utf-8") == page


def test_the_page_of_solvers_names_them_all():
    """And its measure of an order is one: half the step, half the error of a solver of first order."""
    names = runpy.run_path(str(SCRIPTS / "solver_orders"))
    page = (SCRIPTS.parent / "docs" / "solvers.md").read_text("utf-8")
    assert re.findall(r"^\| `(\S+)` \|", page, re.MULTILINE) == list(names["_BUILDERS"])
    assert 1.8 < names["error"]("ddim", 16) / names["error"]("ddim", 32) < 2.2
    assert 3 < names["error"]("ldm-dpm", 16) / names["error"]("ldm-dpm", 32) < 5


def test_the_ledger_of_checkpoints_is_what_the_check_says():
    """`scripts/checkpoints_page` tries every layout that it lists."""
    page = runpy.run_path(str(SCRIPTS / "checkpoints_page"))["page"]()
    assert (SCRIPTS.parent / "docs" / "checkpoints.md").read_text("utf-8") == page
    assert page.count("| yes |") >= 20


def test_the_table_of_durations_adds_up_by_folder(tmp_path):
    cases = [("tests.sampling.test_loop", "test_a[1]", 1), ("tests.sampling.test_noise", "test_b", 3)]
    cases += [("tests.test_docs", "test_c", 2)]
    lines = "".join(f'<testcase classname="{where}" name="{name}" time="{time}"/>' for where, name, time in cases)
    (tmp_path / "report.xml").write_text(f"<testsuites><testsuite>{lines}</testsuite></testsuites>")
    table = runpy.run_path(str(SCRIPTS / "durations"))["table"](str(tmp_path / "report.xml"))
    assert table.splitlines()[2:] == [
        "| sampling | 2 | 4 | test_b (3 s) |",
        "| tests | 1 | 2 | test_c (2 s) |",
        "| all | 3 | 6 | |",
    ]


@pytest.mark.parametrize(
    ("options", "extras", "expressions"),
    [
        ([], ["dev"], [None]),
        (["--e2e", "-x"], ["dev"], ["e2e and not parity and not heavy"]),
        (["--parity"], ["dev", "parity"], ["parity and not heavy"]),
        (["--ray"], ["dev", "ray"], ["ray and not heavy"]),
        (
            ["--all"],
            ["dev", "parity", "ray"],
            [None, "e2e and not parity and not heavy", "parity and not heavy", "ray and not heavy"],
        ),
    ],
)
def test_a_tier_of_tests_is_chosen_by_its_option(options, extras, expressions, monkeypatch, capsys):
    main = runpy.run_path(str(SCRIPTS / "test"))["main"]
    ran, installed = [], []

    def run(command, cwd, env):
        ran.append(command[command.index("-m", 3) + 1] if "-m" in command[3:] else None)
        assert env["UNCLIP_JAX_TEST_CACHE"]
        assert ("-x" in command) == ("-x" in options)
        assert not [argument for argument in command if argument in ("--e2e", "--parity", "--ray", "--all")]
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setitem(main.__globals__, "prepare", lambda extras: installed.extend(extras) or sys.executable)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["test", *options])
    assert main() == 0
    assert ran == expressions
    assert installed == extras
    assert ("--e2e" in capsys.readouterr().out) == (options == [])
