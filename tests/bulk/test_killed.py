"""Bulk jobs of the command line, killed at random moments and started again: the same files, byte for byte."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import pytest
from PIL import Image

from tests.bulk.job_files import files
from tests.pipelines.small_family import photo
from unclip_jax import cli

ROWS, PART = 60, 8
# A shell that runs the tests in the background has its children ignore Ctrl-C.
PROGRAM = """
import signal, sys
from tests.compiled_programs import compile_fast
from unclip_jax.cli import main
compile_fast(True)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main())
"""


@pytest.fixture(scope="module")
def command(family_folder, tmp_path_factory):
    """A command line for rows of two kinds, one of which cannot be made, without `--out`."""
    folder = tmp_path_factory.mktemp("rows")
    Image.fromarray(photo()).save(folder / "photo.png")
    rows = [{"image": "photo.png", "num_inference_steps": 1 + i % 2, "id": i} for i in range(ROWS)]
    rows[5]["image"] = "none.png"
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = {
        "from": folder / "rows.jsonl",
        "model": family_folder("SMALL"),
        "devices": 1,
        "height": 20,
        "width": 24,
    }
    arguments |= {"scheduler": "ddim", "batch-size": 2, "part-size": PART}
    return ["variations", *(str(text) for name, value in arguments.items() for text in (f"--{name}", value))]


@pytest.fixture(scope="module")
def undisturbed(request, command, tmp_path_factory):
    """The command line with the test's options, and the files of a job that ran from its start to its end."""
    out = tmp_path_factory.mktemp("undisturbed")
    command = [*command, *request.param]
    assert cli.main([*command, "--out", str(out)]) == 0
    return command, files(out)


def start(command, out):
    """The command line in a process of its own, which compiles as this one does.

    It reads this run's compiled programs and writes none: one that is written without its time of use, by a process
    that is killed or knows no limit, keeps the others from writing theirs.
    """
    settings = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(jax.config.jax_compilation_cache_max_size),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9",
        "TF_CPP_MIN_LOG_LEVEL": "3",  # as the command sets it, which JAX was imported before
    }
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *command, "--out", out],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **settings, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def names(folder):
    return {os.path.join(place, name) for place, _, found in os.walk(folder) for name in found}


def interrupt_at_random(signals, command, out, chance):
    """Starts the job anew for each signal, and sends it after some of the files that it has yet to write.

    Together they write fewer files than the job has rows, and with the records there are twice as many.
    """
    for number in signals:
        process = start(command, out)
        before = seen = names(out)
        few = chance.randint(0, ROWS // len(signals))
        while len(seen) <= len(before) + few and process.poll() is None:
            time.sleep(0.001)
            seen = seen | names(out)
        time.sleep(chance.uniform(0, 0.05))
        process.send_signal(number)
        printed, error = process.communicate()
        if number == signal.SIGKILL:
            assert process.returncode == -number, error
        else:
            assert (process.returncode, printed, error) == (1, "", "unclip-jax: interrupted\n")


def require_the_same(command, out, want):
    """Runs the job to its end."""
    process = start(command, out)
    _, error = process.communicate()
    assert process.returncode == 0, error
    assert files(out) == want
    assert os.listdir(out / "working") == []


@pytest.mark.e2e
@pytest.mark.parametrize("undisturbed", [()], ids=["files"], indirect=True)
def test_a_job_that_is_killed_and_interrupted_makes_the_same_bytes(undisturbed, tmp_path):
    command, want = undisturbed
    signals = [signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL]
    interrupt_at_random(signals, command, tmp_path, random.Random(0))
    require_the_same(command, tmp_path, want)


@pytest.mark.heavy
@pytest.mark.parametrize("undisturbed", [(), ("--shards",)], ids=["files", "shards"], indirect=True)
def test_a_job_that_is_killed_twenty_times_makes_the_same_bytes(undisturbed, tmp_path):
    command, want = undisturbed
    interrupt_at_random([signal.SIGKILL] * 20, command, tmp_path, random.Random(time.time_ns()))
    require_the_same(command, tmp_path, want)
