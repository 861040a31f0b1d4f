"""Several hosts, as processes on this machine that talk through loopback: one picture, one training, one end."""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import small_models
from tests.distributed import documented_host, one_host
from tests.pipelines.small_family import one_level
from tests.training.small_run import small_run
from unclip_jax.cli import parser
from unclip_jax.distributed import hosts, join, local_mesh
from unclip_jax.distributed.mesh import gathered, own_part, own_rows, placed, replicated

ROOT = Path(__file__).parents[2]


class Device:
    """Of a process; a stand-in where only that is asked."""

    def __init__(self, process):
        self.process_index = process


class Devices:
    def __init__(self, processes, *names):
        self.devices = np.vectorize(Device)(processes)
        self.axis_names, self.shape = names, dict(zip(names, self.devices.shape, strict=True))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"coordinator": "a:1"}, "num_processes, process_id missing"),
        ({"num_processes": 2, "process_id": 0}, "coordinator missing"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "process_id is 2; want 0 to 1"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "coordinator is 'a'; want host:port"),
    ],
    ids=["rest", "coordinator", "range", "port"],
)
def test_half_an_address_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        join(**given)


def test_one_process_is_all():
    assert hosts.each({"a": [1]}) == [{"a": [1]}]
    assert hosts.once(lambda: "path") == "path"
    mesh = local_mesh()
    array = placed(np.arange(8), replicated(mesh))
    np.testing.assert_array_equal(gathered(array), np.arange(8))
    np.testing.assert_array_equal(own_part(mesh, array), np.arange(8))
    np.testing.assert_array_equal(own_rows(mesh, 7), np.arange(7))


@pytest.mark.parametrize(
    ("devices", "rows"),
    [
        (Devices([0, 0, 1, 1], "data"), [0, 1, 4]),
        (Devices([1, 0, 1, 0], "data"), [1, 3]),
        (Devices([[0, 1], [0, 1]], "data", "model"), [0, 1, 2, 3, 4]),
        (Devices([[0, 1], [0, 1]], "model", "data"), [0, 2, 4]),
        (Devices([0, 1], "model"), [0, 1, 2, 3, 4]),
    ],
    ids=["two each", "in turns", "model over hosts", "model within", "model alone"],
)
def test_whose_row_it_is(devices, rows):
    """Of five images, as they are decoded: one a device."""
    assert own_rows(devices, 5).tolist() == rows


def start(stack, module, said, folder=ROOT, **env):
    """One host's process, which ends with the stack at the latest. said: where its stderr goes."""
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(jax.config.jax_compilation_cache_max_size),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    env = {**os.environ, **compiled, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **env}
    program = [sys.executable, "-W", "ignore", "-m", *module]
    process = subprocess.Popen(program, cwd=folder, env=env, stderr=said)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(
    scope="module", params=[pytest.param(2, marks=pytest.mark.e2e), pytest.param(4, marks=pytest.mark.heavy)]
)
def job(request, tmp_path_factory):
    """Hosts that make pictures, train, and go on until one is killed: their folder, and how the others ended."""
    folder = tmp_path_factory.mktemp("hosts")
    small_models.write(one_level(small_models.TEXT_TO_IMAGE), folder / "model")
    coordinator = f"127.0.0.1:{free_port()}"
    with contextlib.ExitStack() as stack:
        running = []
        for process in range(request.param):
            said = stack.enter_context((folder / f"said-{process}").open("wb"))
            arguments = ("tests.distributed.one_host", str(folder), coordinator, str(request.param), str(process))
            running.append(start(stack, arguments, said))
        while not all((folder / f"going-on-{process}").exists() for process in range(request.param)):
            assert all(each.poll() is None for each in running), (folder / "said-0").read_text()
            time.sleep(0.1)
        running[-1].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        for each in running:
            each.wait(timeout=60)
        took = time.monotonic() - killed
    return folder, [each.returncode for each in running], took


def of_hosts(folder, name, hosts):
    return [np.load(folder / f"{name}-{process}.npz") for process in range(hosts)]


def close(a, b, tolerance=1e-5):
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def test_pictures_are_those_of_one_process(job):
    folder, codes, _ = job
    alone = one_host.make(folder, local_mesh(jax.local_devices()[:1]))
    hosts = len(codes)
    shares = {"data": [[row for row in range(5) if row % (2 * hosts) // 2 == h] for h in range(hosts)]}
    shares["model"] = [[0, 1, 2, 3, 4]] * hosts  # of which each has a part of the weights
    for mesh, rows in shares.items():
        for made, own in zip(of_hosts(folder, mesh, hosts), rows, strict=True):
            np.testing.assert_array_equal(made["noise"], alone["noise"])
            assert made["rows"].tolist() == own
            for name in ("latents", "images"):
                assert len(made[name]) == len(own)
                for row, array in zip(own, made[name], strict=True):
                    close(array, alone[name][row])


def test_training_is_that_of_one_process_which_goes_on_with_it(job, tmp_path):
    folder, codes, _ = job
    part = small_run(tmp_path / "part", steps=12)
    for weights in of_hosts(folder, "train", len(codes)):
        for name, value in part.average.params.items():
            np.testing.assert_allclose(weights[name], value, rtol=1e-4, atol=1e-6)
    whole, resumed = small_run(tmp_path / "whole"), small_run(folder / "run")
    for value, want in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(value, want, rtol=1e-4, atol=1e-6)


def test_the_end_of_one_is_the_end_of_all(job):
    folder, codes, took = job
    assert codes == [-signal.SIGABRT] * (len(codes) - 1) + [-signal.SIGKILL]
    assert took < one_host.HEARTBEAT + 20
    for process in range(len(codes) - 1):
        said = (folder / f"said-{process}").read_text()
        assert "Terminating process because the JAX distributed service detected fatal errors" in said
        assert f"stopped sending heartbeats):\n{len(codes) - 1}\n" in said


@pytest.mark.e2e
def test_what_the_page_says(tmp_path):
    """As SLURM starts it on two hosts, which share a folder; JAX finds them by SLURM's variables."""
    small_models.write(one_level(small_models.TEXT_TO_IMAGE), tmp_path / "outputs" / "tiny")
    port = str(free_port())
    with contextlib.ExitStack() as stack:
        running = []
        for process in range(2):
            slurm = {"JOB_ID": "1", "STEP_NODELIST": "localhost", "NTASKS": "2", "PROCID": str(process), "LOCALID": "0"}
            env = {f"SLURM_{name}": value for name, value in slurm.items()} | {"JAX_COORDINATOR_PORT": port}
            said = stack.enter_context((tmp_path / f"said-{process}").open("wb"))
            running.append(start(stack, ("tests.distributed.documented_host",), said, tmp_path, **env))
        for process, each in enumerate(running):
            assert each.wait(timeout=900) == 0, (tmp_path / f"said-{process}").read_text()
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [f"0001-00{i}.png" for i in range(4)]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [f"{i}.png" for i in range(4)]


def test_commands_on_the_page_are_ours():
    """Those of docs/hosts.md that clouds would start, too."""
    by_slurm, by_others = documented_host.commands()
    assert (len(by_slurm), len(by_others)) == (1, 2)
    for command in by_slurm + by_others:
        program, *arguments = shlex.split(command)
        assert program == "unclip-jax"
        assert parser().parse_args(arguments).distributed
