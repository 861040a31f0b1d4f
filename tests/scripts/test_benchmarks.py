"""The benchmarks' wiring, with networks so small that a round takes no time; what they measure is not looked at."""

import dataclasses
import functools
import importlib.util
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
    rows, result = printed_report(capsys)
    assert rows["theirs"][-3:] == ["2.00x", "2.00..4.00", "0.50x"]
    assert result["speed_ratio"] == 2.0
    assert result["speed_ratio_range"] == [2.0, 4.0]
    assert result["peak_memory_ratio"] == 0.5
    assert result["relative_error"] == pytest.approx(0.1 / 5)
    assert result["compile_s"] == 3.0


def test_the_report_has_every_peer_beside_the_first(capsys):
    """The same work counts for all, as the first peer counts it."""
    facts = {"library": "ours", "device": "cpu", "gflop": 1.0, "compile_s": 3.0, "load_s": 2.0}
    measured = {
        "unclip_jax": turns.Side(facts, np.array([3.0, 4.1]), [1.0, 1.0], 2.0),
        "diffusers": turns.Side(
            {"library": "theirs", "load_s": 1.0, "gflop": 6.0}, np.array([3.0, 4.0]), [2.0, 2.0], 4.0
        ),
        "openvino": turns.Side(
            {"library": "third", "load_s": 1.0, "threads": 2}, np.array([3.5, 4.0]), [0.5, 0.5], 1.0
        ),
    }
    turns.report("a step", measured)
    rows, result = printed_report(capsys)
    assert {name: row[3] for name, row in rows.items()} == {"ours": "6", "theirs": "3", "third": "12"}
    assert rows["ours"][-1] == "2.0e-02"
    assert rows["theirs"][-1] == "0.50x"
    assert rows["third"][-4:] == ["0.50x", "0.50..0.50", "2.00x", "1.0e-01"]
    assert list(result["peers"]) == ["diffusers", "openvino"]
    assert result["peers"]["diffusers"]["speed_ratio"] == result["speed_ratio"] == 2.0
    assert result["peers"]["openvino"]["speed_ratio"] == 0.5
    assert result["peers"]["openvino"]["threads"] == 2
    assert result["peers"]["openvino"]["relative_error"] == pytest.approx(np.hypot(0.5, 0.1) / np.hypot(3.5, 4.0))
    assert result["unclip_jax"]["gflop_per_s"] == 6.0


def printed_report(capsys):
    """The table's rows by their first word, and the line of JSON."""
    _, _, *table, _, line = capsys.readouterr().out.splitlines()
    return {row.split()[0]: row.split()[1:] for row in table}, json.loads(line)


def test_a_library_that_does_not_load_is_named():
    with pytest.raises(SystemExit, match="broken could not be loaded"):
        turns.processes_in_turns({"broken": sides.end}, 1)


@pytest.mark.parametrize(("missing", "message"), [("torch", "extra `parity`"), ("openvino", "`pip install openvino`")])
def test_a_missing_peer_is_named_before_anything_runs(monkeypatch, missing, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else True)
    for name in ("unet", "vae", "towers"):
        with pytest.raises(SystemExit, match=f"--peers: {missing} is not installed.*{message}"):
            command(name)["main"](["--peers", "openvino"])


@pytest.fixture(scope="module")
def diffusers_folder(small, tmp_path_factory):
    """It as diffusers would have written it."""
    with open_checkpoint(small) as checkpoint:
        return save_diffusers(checkpoint, tmp_path_factory.mktemp("benchmarks") / "diffusers")[0]


@pytest.fixture(scope="module")
def unet_folder(diffusers_folder):
    return diffusers_folder / "unet"


def loaded(source, name):
    """A network of a checkpoint on one device."""
    with open_checkpoint(source) as checkpoint:
        abstract = {name: abstract_networks(checkpoint.config)[name]}
        return load_networks(checkpoint, abstract, local_mesh(jax.devices()[:1]), progress=False)[name]


def test_the_unet_is_the_one_in_the_folder(small, unet_folder):
    names = command("unet")
    data = names["inputs"](2, 8, (16, 32), 32)
    step, facts = names["unclip_jax_step"](str(unet_folder), data, "float32", False)
    unet = loaded(small, "unet")
    call = jax.jit(lambda params, *given: unet.merge(params)(*given))
    want = call(unet.params, data["x"], np.full(2, names["TIMESTEP"]), data["context"], data["labels"])
    np.testing.assert_allclose(step(), want, rtol=1e-4, atol=1e-5)
    assert facts["gflop"] > 0


def test_the_decoder_is_the_one_in_the_folder(small, diffusers_folder):
    vae = loaded(small, "vae")
    z = np.random.default_rng(0).standard_normal((1, 4, 4, 4), np.float32)
    config = vae.merge().config
    step, facts = command("vae")["unclip_jax_step"](str(diffusers_folder / "vae"), config, z, "float32", False)
    want = jax.jit(lambda params, z: vae.merge(params).decode(z))(vae.params, z)
    np.testing.assert_allclose(step(), want, rtol=1e-4, atol=1e-5)
    assert facts["gflop"] > 0


@pytest.mark.parametrize("tower", ["image", "text"])
def test_the_towers_are_the_ones_in_the_folder(small, diffusers_folder, tower):
    names = command("towers")
    component = names["COMPONENTS"][tower]
    network = loaded(small, component)
    config = dataclasses.replace(network.merge().config, **{"projection_dim": None} if tower == "text" else {})
    data = names["inputs"](tower, config, 2)
    step, _ = names["unclip_jax_step"](tower, str(diffusers_folder / component), config, data, "float32")
    want = jax.jit(lambda params, x: network.merge(params)(x))(network.params, data)
    np.testing.assert_allclose(step(), want, rtol=1e-4, atol=1e-5)


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


@pytest.mark.e2e
def test_the_loop_beside_its_calls(small, capsys):
    command("loop")["main"]([str(small), "--steps", "3", "--rounds", "1", "--schedulers", "dpm++2m-sde"])
    solver, calls, *seconds, ratio, kept = capsys.readouterr().out.splitlines()[-1].split()
    assert (solver, calls, kept) == ("dpm++2m-sde", "3", "1")
    assert len([float(number) for number in seconds]) == 3
    assert ratio.endswith("%")


@pytest.mark.e2e
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


@pytest.mark.e2e
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
