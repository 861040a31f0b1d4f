"""The benchmarks' wiring, with networks so small that a round takes no time; what they measure is not looked at."""

import dataclasses
import functools
import json
import os
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

import turns
from convert.export.diffusers import save_diffusers
from tests import small_models
from tests.pipelines.small_family import one_level
from tests.scripts import sides
from training_step import training_data, unclip_jax_training
from unclip_jax.checkpoints.loading import load_networks
from unclip_jax.checkpoints.networks import abstract_networks
from unclip_jax.checkpoints.source import open_checkpoint
from unclip_jax.distributed.mesh import local_mesh

BENCHMARKS = Path(__file__).parents[2] / "scripts" / "benchmarks"
COMMANDS = sorted(path.name for path in BENCHMARKS.iterdir() if path.is_file() and not path.suffix)


def command(name):
    return runpy.run_path(str(BENCHMARKS / name))


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])


@pytest.fixture(scope="module")
def small(family_folder):
    """An unCLIP model with 16x16 images and a UNet of one level."""
    return family_folder("SMALL")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_benchmark_has_its_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        command(name)["main"](["--help"])
    assert ended.value.code == 0
    assert f"scripts/benchmarks/{name}" in capsys.readouterr().out


@pytest.mark.parametrize(("alone", "order"), [(False, "abaabbaabb"), (True, "aaaaabbbbb")])
def test_libraries_take_turns_in_processes_of_their_own(tmp_path, alone, order):
    log = tmp_path / "log"
    loads = {name: functools.partial(sides.load, name, str(log)) for name in "ab"}
    measured = turns.processes_in_turns(loads, 2, steps=2, alone=alone)
    assert log.read_text() == order
    for name, side in measured.items():
        assert side.facts["library"] == name
        assert side.facts["load_s"] >= 0
        assert side.first == 1
        assert len(side.seconds) == 2
        assert side.peak > 0


def test_ways_take_turns_and_the_first_round_is_told_apart():
    order = []
    timed = turns.in_turns({name: functools.partial(order.append, name) for name in "ab"}, 2)
    assert order == [*"ababab"]
    assert [len(seconds) for seconds in timed.values()] == [3, 3]


def test_the_report_compares_round_by_round(capsys):
    """A machine that becomes ten times slower has slowed both."""
    facts = {"library": "ours", "device": "cpu", "gflop": 1.0, "compile_s": 3.0, "load_s": 2.0}
    ours = turns.Side(facts, np.array([3.0, 4.1]), [1.0, 10.0, 1.0], 2.0)
    theirs = turns.Side({"library": "theirs", "load_s": 1.0}, np.array([3.0, 4.0]), [2.0, 20.0, 4.0], 4.0)
    turns.report("a step", {"unclip_jax": ours, "diffusers": theirs})
    printed = capsys.readouterr().out
    assert "unclip_jax is 2.00x as fast (2.00..4.00 by pairs), with 0.50x the memory" in printed
    result = json.loads(printed.splitlines()[-1])
    assert result["speed_ratio_range"] == [2.0, 4.0]
    assert result["relative_error"] == pytest.approx(0.1 / 5)


@pytest.fixture(scope="module")
def unet_folder(small, tmp_path_factory):
    """Its UNet, as diffusers would have written it."""
    with open_checkpoint(small) as checkpoint:
        return save_diffusers(checkpoint, tmp_path_factory.mktemp("benchmarks") / "diffusers")[0] / "unet"


def test_the_unet_is_the_one_in_the_folder(small, unet_folder):
    names = command("unet")
    data = names["inputs"](2, 8, (16, 32), 32)
    step, facts = names["unclip_jax_step"](str(unet_folder), data, "float32")
    with open_checkpoint(small) as checkpoint:
        abstract = {"unet": abstract_networks(checkpoint.config)["unet"]}
        unet = load_networks(checkpoint, abstract, local_mesh(jax.devices()[:1]), progress=False)["unet"]
    call = jax.jit(lambda params, *given: unet.merge(params)(*given))
    want = call(unet.params, data["x"], np.full(2, names["TIMESTEP"]), data["context"], data["labels"])
    np.testing.assert_allclose(step(), want, rtol=1e-4, atol=1e-5)
    assert facts["gflop"] > 0


def test_training_steps_lower_the_loss(unet_folder, one_device):
    step, _ = unclip_jax_training(str(unet_folder), training_data(1, 8, (16, 32), 32), "float32", 2)
    losses = [step() for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize(("cores", "batch", "devices"), [(2, 4, True), (3, 4, False)])
def test_training_is_spread_over_the_cores_that_divide_the_batch(monkeypatch, cores, batch, devices):
    spread = command("train")["a_device_a_core"]
    monkeypatch.setenv("XLA_FLAGS", "--one")
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setitem(spread.__globals__, "unclip_jax_training", lambda *given: given)
    data = {"x": np.zeros((batch, 1))}
    assert spread("folder", data, "float32") == ("folder", data, "float32", None)
    assert os.environ["XLA_FLAGS"] == "--one" + f" --xla_force_host_platform_device_count={cores}" * devices


def test_the_loop_beside_its_calls(small, capsys):
    command("loop")["main"]([str(small), "--steps", "3", "--rounds", "1", "--schedulers", "dpm++2m-sde"])
    solver, calls, *seconds, ratio, kept = capsys.readouterr().out.splitlines()[-1].split()
    assert (solver, calls, kept) == ("dpm++2m-sde", "3", "1")
    assert len([float(number) for number in seconds]) == 3
    assert ratio.endswith("%")


def test_one_device_beside_many(small, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # to be set back
    command("devices")["main"]([str(small), "--count", "4", "--rounds", "1"])
    printed = capsys.readouterr().out
    assert printed.startswith("4 images, 5 steps, 4 virtual devices")
    for way in ("one device", "jit", "shard_map", "pmap"):
        assert f"\n{way} " in printed


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """With so many words that the rest is small beside them."""
    text = dataclasses.replace(small_models.TEXT, vocab_size=500_000)
    config = dataclasses.replace(one_level(small_models.SMALL), text_encoder=text)
    return str(small_models.write(config, tmp_path_factory.mktemp("benchmarks") / "wide"))


@pytest.mark.parametrize("free", [False, True])
def test_the_planned_memory_beside_what_is_taken(wide, one_device, capsys, free):
    """Freed, the stages with the wide text encoder's weights are one instead of all."""
    command("memory")["main"]([wide, "--size", "16", *["--free-networks"] * free])
    rows = {line[:20].rstrip(): line[20:].split() for line in capsys.readouterr().out.splitlines()[2:-1]}
    assert len(rows) == (4 if free else 5)
    rows.pop("loading weights", None)  # into what the heap still has from the first time
    large = {name: float(ratio) for name, (planned, _, ratio) in rows.items() if int(planned) > 50}
    assert len(large) == (1 if free else 4)
    assert all(0.7 < ratio < 1.4 for ratio in large.values()), large
