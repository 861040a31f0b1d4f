"""Bulk jobs on a Ray cluster of three nodes on this machine: the same files as in one process, whatever dies."""

import functools
import itertools
import os
import random
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest
import yaml
from ray.cluster_utils import Cluster

from tests import readme
from tests.bulk.job_files import files
from tests.bulk.jobs import SETTINGS, open_in_actor, write_rows
from unclip_jax import bulk
from unclip_jax.bulk import engine

ROOT = Path(__file__).parents[2]
JOB = {"save": "latents", "batch_size": 1, "part_size": 5, **SETTINGS}
ACTORS = {"workers": 2, "resources": {"num_cpus": 0, "resources": {"maker": 1}}, "progress": False}
NODE = {"num_cpus": 1, "resources": {"maker": 1}, "object_store_memory": 80 << 20}
MINUTES = 5  # that anything may take on a busy machine

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),  # Ray's, of its own functions
    pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning"),  # by nodes that are added
]


@pytest.fixture(scope="module")
def cluster():
    """A head, and two nodes for actors. Their processes find the tests, and compile as the tests do."""
    environment = {
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(jax.config.jax_compilation_cache_max_size),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args={**NODE, "resources": {}, "include_dashboard": False})
        for _ in range(2):
            cluster.add_node(**NODE)
        yield cluster
        cluster.shutdown()


@pytest.fixture(scope="module")
def folder(family_folder):
    return family_folder("SMALL")


@pytest.fixture(scope="module")
def undisturbed(pipe, rows, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    bulk.run(pipe, rows, out, **JOB)
    return files(out)


@pytest.fixture
def on_ray(cluster, folder, rows, tmp_path):
    """on_ray(**changes): the job, on the cluster."""
    (tmp_path / "makers").mkdir()

    def run(seconds=0.0, **changes):
        opening = functools.partial(open_in_actor, folder, tmp_path / "makers", seconds)
        given = {"rows": rows, "out": tmp_path / "out", "address": cluster.address, **JOB, **ACTORS, **changes}
        return bulk.run_on_ray(opening, **given)

    return run


def until(condition, what):
    """Waits."""
    end = time.monotonic() + 60 * MINUTES
    while not (found := condition()):
        assert time.monotonic() < end, what
        time.sleep(0.05)
    return found


def test_bad_rows_and_other_jobs_are_refused_as_in_one_process(on_ray, pipe, rows, undisturbed, tmp_path):
    """A job that stopped on the cluster then goes on here."""
    words = "1 rows failed, and max_errors is 0; the last: row 3: ValueError: image: not an image"
    with pytest.raises(ValueError, match=f"^{words}[^\n]*$"):
        on_ray(max_errors=0, workers=1)
    words = re.escape(f"{tmp_path / 'out'}: holds another job: settings is ")
    with pytest.raises(ValueError, match=f"^{words}[^\n]*$"):
        on_ray(guidance_scale=2.0)
    assert bulk.run(pipe, rows, tmp_path / "out", max_errors=1, **JOB).made < 9
    assert files(tmp_path / "out") == undisturbed


def test_a_job_that_was_interrupted_here_goes_on_there(on_ray, pipe, rows, undisturbed, tmp_path, monkeypatch):
    write, batches = engine.Store.write, itertools.count()

    def stumbling(self, name, data):
        if name.startswith("working/") and next(batches) == 2:
            raise KeyboardInterrupt
        write(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(engine.Store, "write", stumbling)
        with pytest.raises(KeyboardInterrupt):
            bulk.run(pipe, rows, tmp_path / "out", **JOB)
    assert len(list((tmp_path / "out/working/000000").iterdir())) == 2
    before = rows.read_text()
    try:
        rows.write_text(before.replace('"row 4"', '"row four"'))
        with pytest.raises(ValueError, match=r"^.*: was begun with another input: rows 0 to 4 are not those[^\n]*$"):
            on_ray()  # an actor finds it
    finally:
        rows.write_text(before)
    summary = on_ray()
    assert (summary.rows, summary.images, summary.failed) == (10, 9, 1)
    assert files(tmp_path / "out") == undisturbed
    assert on_ray().made == 0


def test_a_node_dies_and_others_go_on_with_its_part(cluster, on_ray, undisturbed, tmp_path):
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(on_ray, seconds=1.5)
        until(lambda: job.done() or list(tmp_path.glob("out/working/*/*.jsonl")), "nothing is made")
        assert not job.done(), job.result()
        maker = max((tmp_path / "makers").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        (node,) = [node for node in cluster.list_all_nodes() if maker.name.startswith(node.node_id)]
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(**NODE)
        summary = job.result(60 * MINUTES)
    assert (summary.rows, summary.images, summary.failed) == (10, 9, 1)
    assert len(list((tmp_path / "makers").iterdir())) > 1
    assert files(tmp_path / "out") == undisturbed


@pytest.mark.heavy
def test_actors_are_killed_at_random(on_ray, pipe, tmp_path):
    rows, draws, killed = write_rows(tmp_path, tens=10), random.Random(0), set()
    bulk.run(pipe, rows, tmp_path / "undisturbed", **JOB)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(on_ray, seconds=0.5, rows=rows)

        def at_work():
            return {int(path.name.rpartition("-")[2]) for path in (tmp_path / "makers").iterdir()} - killed

        for _ in range(20):
            maker = draws.choice(sorted(until(at_work, "no actor starts")))
            time.sleep(draws.uniform(0, 2))
            assert not job.done(), job.result()
            os.kill(maker, signal.SIGKILL)
            killed.add(maker)
        summary = job.result(60 * MINUTES)
    assert (summary.rows, summary.images, summary.failed) == (100, 90, 10)
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")


def test_the_page(cluster, desk, monkeypatch, capsys):
    """docs/cluster.md. Its command runs on the cluster of the tests, and the demo model in an actor."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    for language, text in readme.blocks("docs/cluster.md"):
        if language == "yaml":
            assert yaml.safe_load(text)
        else:
            readme.run(language, text, page="docs/cluster.md")
    _, *table = capsys.readouterr().out.partition("4 rows: 4 images, 0 rows failed\n")[2].splitlines()
    page = (ROOT / "docs/cluster.md").read_text("utf-8")
    assert all(f"{row}\n" in page for row in table)
    assert len(table) == 4
    assert len(list(desk.glob("outputs/levels/files/*/*.png"))) == 4
