"""The virtual environment that the scripts beside this file work in.

Standard library only and no syntax newer than Python 3.7, so that an old Python gets a sentence and not a traceback.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)


class SetupError(Exception):
    """Something that the person has to mend, in one line."""


def prepare(extras=(), folder=None, constraints=()):
    """Install this checkout, editable and with `extras`, and return the Python (a Path) that has it.

    The environment is `folder`; or the folder that the variable UNCLIP_JAX_VENV names; or the active virtual
    environment, if unclip_jax is installed there; or `.venv` in the checkout. It is made where it is missing, and
    installed into again only for another extra or when pyproject.toml or the Python has changed. `constraints` are the
    lines of a pip constraints file. Raises SetupError.
    """
    if sys.version_info < OLDEST_PYTHON:
        have, want = (".".join(map(str, version)) for version in (sys.version_info[:3], OLDEST_PYTHON))
        raise SetupError(f"Python {want} or newer is needed; {sys.executable} is Python {have}")
    folder = folder or choose_folder()
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not _runs(python, "import pip"):
        _create(folder)
    stamp = folder / "unclip_jax.stamp"  # what was installed from, then the extras that were
    source = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + (str(ROOT) + sys.version).encode()).hexdigest()
    done = stamp.read_text().split() if stamp.exists() else []
    if done[:1] != [source]:
        done = []
    if not done or not set(extras) <= set(done):
        _install(python, extras, constraints, folder / "install.log")
        stamp.write_text("\n".join([source, *sorted({*done[1:], *extras})]) + "\n")
    return python


def choose_folder():
    """Where the virtual environment is or will be."""
    if os.environ.get("UNCLIP_JAX_VENV"):
        return Path(os.environ["UNCLIP_JAX_VENV"]).resolve()
    if sys.prefix != sys.base_prefix and importlib.util.find_spec("unclip_jax"):
        return Path(sys.prefix)
    return ROOT / ".venv"


def _runs(python, code):
    try:
        return subprocess.run([str(python), "-c", code], stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def _create(folder):
    if folder.exists() and not (folder / "pyvenv.cfg").exists() and (folder.is_file() or any(folder.iterdir())):
        raise SetupError(f"{folder} is there and is no virtual environment; move it away or name another")
    print(f"Making a virtual environment in {folder}", flush=True)
    made = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if made.returncode:
        shutil.rmtree(str(folder), ignore_errors=True)
        if "ensurepip" in made.stdout or "No module named venv" in made.stdout:
            raise SetupError("this Python comes without venv or pip; Debian and Ubuntu: apt install python3-venv")
        raise SetupError(f"cannot make {folder}: {last_line(made.stdout)}")


def _install(python, extras, constraints, log):
    """pip install, its many lines cut down to the few that show that it moves; all of them are kept in `log`."""
    print(" ".join(["Installing unclip_jax and what it needs", *(f"[{extra}]" for extra in extras)]), flush=True)
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar=off"]
    command += ["--editable", f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)]
    if constraints:
        bounds = log.with_name("constraints.txt")
        bounds.write_text("\n".join(constraints) + "\n")
        command += ["--constraint", str(bounds)]
    start = time.monotonic()
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        for line in pip.stdout:
            lines.append(line)
            download = re.match(r"\s*Downloading (?:.*/)?([^/-]+)-\S* \((\d[\d.]* [MG]B)\)", line)
            if download:
                print("  downloading {}, {}".format(*download.groups()), flush=True)
            elif line.startswith("Installing collected packages"):
                print(f"  unpacking {line.count(',') + 1} packages", flush=True)
    output = "".join(lines)
    log.write_text(output)
    if pip.returncode:
        if "connection broken by" in output or "Could not fetch URL" in output:
            raise SetupError(f"pip cannot reach the package index: no network, or a proxy is not set (log: {log})")
        if "No space left on device" in output:
            raise SetupError(f"the disk is full; the environment is in {log.parent}")
        raise SetupError(f"pip install failed: {last_line(output, 'ERROR')} (log: {log})")
    print(f"  done in {time.monotonic() - start:.0f} s", flush=True)


def last_line(text, containing=""):
    """The last line of what a program printed that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and containing in line]
    return lines[-1] if lines else "no message"
