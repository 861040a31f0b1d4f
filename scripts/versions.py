"""Both ends of the versions that pyproject.toml allows, for scripts/test.

The oldest go into a virtual environment of the oldest Python. The newest need a Python that few machines have, so they
go into a root of Debian 13, and the tests run in there. Both lie beside the usual virtual environment.
"""

import os
import re
import shutil
import subprocess
import sys

from environment import OLDEST_PYTHON, ROOT, SetupError, choose_folder, last_line, prepare

RELEASE = "trixie"  # Debian 13: Python 3.13
MIRROR = "http://deb.debian.org/debian"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
FROM_MACHINE = ["/etc/resolv.conf", "/etc/hosts", CERTIFICATES]  # the network is reached as the machine reaches it
PASSED_ON = ["CI", "PIP_INDEX_URL", "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"]
IN_NAMESPACE = ["unshare", "--mount", "--"]  # what the command mounts is gone when it ends
IN_ROOT = """
root=$1 checkout=$2
shift 2
for folder in proc sys dev; do mount --rbind /$folder "$root/$folder" || exit; done
mount --bind "$checkout" "$root/checkout" || exit
exec chroot "$root" "$@"
"""


def prepare_oldest(extras):
    """As environment.prepare, with the oldest of all that users install, in an environment of its own."""
    if sys.version_info[:2] != OLDEST_PYTHON:
        have, want = (".".join(map(str, version)) for version in (sys.version_info[:2], OLDEST_PYTHON))
        raise SetupError(f"--oldest needs Python {want}, the oldest allowed; {sys.executable} is Python {have}")
    return prepare(extras, _beside("oldest"), lower_bounds((ROOT / "pyproject.toml").read_text("utf-8")))


def lower_bounds(pyproject):
    """What users install, each at its lower bound, as lines of a pip constraints file; the tools of `dev` are free."""
    import tomllib

    project = tomllib.loads(pyproject)["project"]
    extras = [needs for extra, needs in project["optional-dependencies"].items() if extra != "dev"]
    bounds = [re.match(r"([\w.-]+)>=([\d.]+)", need) for need in sum(extras, project["dependencies"])]
    return sorted({"{}=={}".format(*bound.groups()) for bound in bounds if bound})


def run_newest(arguments):
    """Run scripts/test with `arguments` on the newest of everything, and return its exit status. Raises SetupError."""
    _check_rights()
    root = _beside("newest")
    if not root.exists():
        _make_root(root)
    shutil.rmtree(str(root / "venv"), ignore_errors=True)  # what was the newest when it was made
    for name in FROM_MACHINE:
        if os.path.exists(name):
            shutil.copyfile(name, str(root) + name)
    (root / "checkout").mkdir(exist_ok=True)
    environ = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    environ.update(PATH="/usr/bin:/bin", HOME="/root", LANG="C.UTF-8", UNCLIP_JAX_VENV="/venv", PIP_CERT=CERTIFICATES)
    command = ["env", "-i", *(f"{name}={value}" for name, value in environ.items())]
    command += ["python3", "/checkout/scripts/test", *arguments]
    return subprocess.run([*IN_NAMESPACE, "sh", "-c", IN_ROOT, "sh", str(root), str(ROOT), *command]).returncode


def _beside(name):
    usual = choose_folder()
    return usual.with_name(f"{usual.name}-{name}")


def _check_rights():
    """Raises SetupError where a Debian root cannot be made or entered."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        raise SetupError("--newest makes a Debian root and runs the tests in it, for which it needs Linux and root")
    _run(
        [*IN_NAMESPACE, "mount", "--bind", "/tmp", "/tmp"], "--newest mounts folders in a Debian root; not allowed here"
    )
    if not shutil.which("debootstrap"):
        print("Installing debootstrap", flush=True)
        failure = "--newest makes a Debian root with debootstrap, which cannot be installed"
        _run(["apt-get", "update"], failure)
        _run(["apt-get", "install", "--yes", "debootstrap", "debian-archive-keyring"], failure)


def _make_root(root):
    print(f"Making a root of Debian {RELEASE} in {root}", flush=True)
    partial = root.with_name(root.name + ".partial")
    shutil.rmtree(str(partial), ignore_errors=True)
    packages = "--include=python3,python3-venv,ca-certificates"
    command = ["debootstrap", "--variant=minbase", packages, RELEASE, str(partial), MIRROR]
    _run([*IN_NAMESPACE, *command], f"debootstrap cannot make {root}")
    partial.rename(root)


def _run(command, failure):
    """Raises SetupError with `failure` and the last line of what the command printed."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise SetupError(f"{failure}: {error}") from None
    if done.returncode:
        raise SetupError(f"{failure}: {last_line(done.stdout)}")
