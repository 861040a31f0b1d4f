"""Conversions killed at random points: the result is there whole, or not at all, and the next run sweeps the rest."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from convert.random import write_random_checkpoint
from unclip_jax.checkpoints.source import open_checkpoint

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
LAYOUTS = ("jax", "orbax", "diffusers", "original")

# Imports once, and makes a process for each line of arguments: prints its id, and its status when it ends.
NURSERY = """
import json, os, sys
from convert.__main__ import main
import convert.export.diffusers, convert.export.original, convert.merge, convert.source
import unclip_jax.checkpoints.source
import orbax.checkpoint, tensorstore

for line in sys.stdin:
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main(json.loads(line)))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A small checkpoint and its yaml, and the parameters that are in it."""
    file, config = write_random_checkpoint(tmp_path_factory.mktemp("source") / "tiny.safetensors")
    with open_checkpoint(file, config=config) as checkpoint:
        return file, config, {name: parameter.read().copy() for name, parameter in checkpoint.params.items()}


@pytest.fixture(scope="module")
def nursery():
    with subprocess.Popen(
        [sys.executable, "-c", NURSERY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        bufsize=1,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"},
    ) as process:
        yield process
        process.stdin.close()


class Conversion:
    """One run in a process of its own."""

    def __init__(self, nursery, arguments):
        self.nursery = nursery
        nursery.stdin.write(json.dumps([str(a) for a in arguments]) + "\n")
        self.pid = int(nursery.stdout.readline())

    def kill(self, number):
        # It may have ended a moment ago; nobody else has its number until the nursery is asked for another.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self):
        return int(self.nursery.stdout.readline())


def remains(folder):
    return {path.name for path in folder.iterdir()}


def kill_at_random_points(points, layout, command, source, nursery, folder, seed):
    """Kills runs for one destination one after the other. Returns how many had written it by then.

    command: () for a conversion; or what adds the difference between the source and itself, which is none.
    """
    file, config, wanted = source
    chance = random.Random(seed)
    name = "x.safetensors" if layout == "original" else "x"
    destination, beside = folder / name, folder / "x.safetensors.yaml"
    others = ("--config-b", config, "--config-c", config) if command else ()
    arguments = (*command, *[file] * (3 if command else 1), destination, "--to", layout, "--config", config, *others)
    options = {"config": beside} if layout == "original" else {}

    def require_whole():
        with open_checkpoint(destination, **options) as checkpoint:
            assert checkpoint.params.keys() == wanted.keys()
            for key, parameter in checkpoint.params.items():
                np.testing.assert_array_equal(parameter.read(), wanted[key], strict=True)

    def remove():
        assert subprocess.run(["rm", "-r", destination, *([beside] if layout == "original" else [])]).returncode == 0

    def run():
        conversion = Conversion(nursery, arguments)
        start = time.monotonic()
        while not any(".partial-" in entry for entry in remains(folder)) and not destination.exists():
            time.sleep(0.001)
        writing = time.monotonic()
        assert conversion.wait() == 0
        return writing - start, time.monotonic() - writing

    reading, writing = run()
    require_whole()
    remove()
    whole = 0
    for point in range(points):
        conversion = Conversion(nursery, arguments)
        # A quarter before anything is written, the others while it is.
        time.sleep(chance.uniform(0, reading) if point % 4 == 0 else reading + chance.uniform(-0.1, 1.1) * writing)
        conversion.kill(SIGNALS[point % 3])
        status = conversion.wait()
        left = remains(folder) - {name, beside.name}
        assert all(entry.startswith(f".{name}.partial-") for entry in left), left
        assert len(left) <= 1  # the run before it was swept by this one
        if SIGNALS[point % 3] != signal.SIGKILL and status not in (-signal.SIGINT, -signal.SIGTERM):
            assert f".{name}.partial-{conversion.pid}" not in left, "what could clean up has left something"
        if destination.exists():
            whole += 1
            require_whole()
            remove()
        else:
            assert status != 0
    run()
    require_whole()
    assert remains(folder) == ({name, beside.name} if layout == "original" else {name})
    return whole


@pytest.mark.e2e
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_conversion_killed_at_random_points(layout, source, nursery, tmp_path):
    kill_at_random_points(6, layout, (), source, nursery, tmp_path, seed=0)


@pytest.mark.heavy
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("command", [(), ("add-difference",)], ids=["convert", "add-difference"])
def test_a_conversion_killed_at_many_random_points(layout, command, source, nursery, tmp_path):
    kill_at_random_points(60, layout, command, source, nursery, tmp_path, seed=time.time_ns())
