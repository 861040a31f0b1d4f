"""What a bulk job on a cluster needs of this process; test_cluster_ray.py has the cluster."""

import types
import warnings

import pytest

from unclip_jax import bulk, cli
from unclip_jax.bulk import cluster
from unclip_jax.bulk.batches import Part
from unclip_jax.bulk.rows import Row

JOB = ["variations", "--from", "rows.jsonl", "--out"]


@pytest.mark.parametrize(
    ("options", "resources", "workers"),
    [
        ([], {"num_cpus": 1}, 1),
        (["--worker-gpus", "1", "--workers", "4"], {"num_gpus": 1}, 4),
        (["--worker-tpus", "4", "--workers", "1", "16"], {"resources": {"TPU": 4}}, (1, 16)),
        (["--worker-cpus", "8"], {"num_cpus": 8}, 1),
    ],
)
def test_the_command_line_names_the_cluster(options, resources, workers, tmp_path, monkeypatch):
    given = {}

    def run_on_ray(opening, rows, out, **options):
        given.update(options, opening=opening, rows=rows)
        return types.SimpleNamespace(lines=list, failed=0)

    monkeypatch.setattr(bulk, "run_on_ray", run_on_ray)
    assert cli.main([*JOB, str(tmp_path), "--engine", "ray", "--address", "auto", "--strict", *options]) == 0
    assert (given["address"], given["resources"], given["workers"]) == ("auto", resources, workers)
    assert (given["rows"], given["max_errors"], given["opening"].args[0].command) == ("rows.jsonl", 0, "variations")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--address", "auto"], "--address is of a cluster: give --engine ray, too"),
        (["--worker-tpus", "4"], "--worker-tpus is of a cluster"),
        (["--engine", "ray", "--distributed"], "--engine ray or --distributed, not both"),
        (["--engine", "ray", "--workers", "1", "2", "3"], "--workers 1 2 3: want a number, or the least and the most"),
        (["--engine", "ray", "--workers", "3", "2"], "workers is (3, 2); want a number from 1"),
        (["--engine", "ray", "--workers", "0"], "workers is 0; want a number from 1"),
    ],
)
def test_what_is_no_cluster_is_refused_by_name(options, words, tmp_path, capsys):
    assert cli.main([*JOB, str(tmp_path / "out"), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not (tmp_path / "out").exists()


def test_rows_with_pictures_in_them_are_held_back(monkeypatch):
    monkeypatch.setattr(cluster, "PARTS_AT_ONCE", 4)
    monkeypatch.setattr(cluster, "BYTES_AT_ONCE", 2000)
    small = (Part(i, [Row(i, {"prompt": "a"}, {})]) for i in range(6))
    assert [len(some) for some in cluster._some_at_once(small)] == [4, 2]
    large = (Part(i, [Row(i, {"image": bytes(1500)}, {})]) for i in range(3))
    assert [len(some) for some in cluster._some_at_once(large)] == [2, 1]


def test_a_cluster_without_such_a_machine_is_warned_of():
    nodes = [
        {"Alive": True, "Resources": {"CPU": 8.0}},
        {"Alive": False, "Resources": {"CPU": 8.0, "GPU": 1.0}},
        {"Alive": True, "Resources": {"CPU": 8.0, "TPU": 4.0}},
    ]
    with warnings.catch_warnings():
        cluster._warn_of_waiting(nodes, {"resources": {"TPU": 4}})
        cluster._warn_of_waiting(nodes, {"num_cpus": 8})
    with pytest.warns(UserWarning, match="no machine of the cluster has 1 GPU for a worker; the job waits for one"):
        cluster._warn_of_waiting(nodes, {"num_gpus": 1})
