"""A run as a whole: it goes on where it was killed, bit for bit, and stops at what is no number and at a full disk."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.training import small_run as small
from tests.training.small_run import STEPS, small_run
from unclip_jax.training.run import RunOptions

pytestmark = pytest.mark.usefixtures("fully_compiled")


def same(got, want, **tolerance):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if tolerance:
            np.testing.assert_allclose(g, w, **tolerance)
        else:
            np.testing.assert_array_equal(g, w)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped: its folder and its last state."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, small_run(folder)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(folder):
    timed = ("images_per_second", "seconds_per_step", "data_wait")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines(folder)]


class Stop(Exception):
    pass


def start(how, folder):
    """The small run in a process of its own."""
    root = Path(__file__).parents[2]
    program = [sys.executable, "-W", "ignore", "-m", "tests.training.small_run", how, str(folder)]
    env = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(program, cwd=root, env=env, stderr=subprocess.PIPE, text=True)


@pytest.mark.e2e
@pytest.mark.parametrize("last", [1, 2, 6, 10, 11, 16])
def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not(last, whole, tmp_path):
    def stop(step, metrics):
        if step >= last:
            raise Stop

    with pytest.raises(Stop):
        small_run(tmp_path, reports=[stop])
    same(small_run(tmp_path), whole[1])
    # Means are over the steps since the last line, which a checkpoint begins anew.
    assert [line["step"] for line in lines(tmp_path)] == sorted({line["step"] for line in lines(tmp_path)})
    assert timeless(tmp_path)[-1] == timeless(whole[0])[-1]


@pytest.mark.e2e
def test_a_run_that_is_killed_goes_on(tmp_path):
    """By SIGKILL, again and again, until it is through."""
    kills = 0
    checkpoints = tmp_path / "checkpoints"
    for wanted in (3, 9, STEPS):
        process = start("slow", tmp_path)
        while process.poll() is None and (wanted == STEPS or not (checkpoints / str(wanted)).exists()):
            time.sleep(0.005)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills >= 1
    assert process.returncode == 0
    state = small_run(tmp_path, save_every=3)  # is through: reads the last state
    same(state, small_run(tmp_path / "never", save_every=3))


def test_a_run_that_is_through_does_nothing(whole):
    before = (whole[0] / "metrics.jsonl").read_bytes()
    same(small_run(whole[0]), whole[1])
    assert (whole[0] / "metrics.jsonl").read_bytes() == before


def test_metrics_and_images(tmp_path):
    seen = []
    small_run(tmp_path, reports=[lambda step, metrics: seen.append((step, metrics))], sample_every=12)
    assert [step for step, _ in seen] == [1, 2, 4, 5, 6, 8, 10, 12, 14, 15, 16, 18, 20, 22, 24]
    assert [{"step": step, **metrics} for step, metrics in seen] == lines(tmp_path)
    assert {"loss", "grad_norm", "timestep", "images_per_second", "data_wait"} <= seen[0][1].keys()
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["00000012.png", "00000024.png"]
    assert Image.open(tmp_path / "samples/00000012.png").getpixel((0, 0)) == (12, 0, 0)


def test_the_last_and_the_best_are_kept(tmp_path):
    scores = iter([3.0, 1.0, 2.0, 4.0, 5.0])
    small_run(tmp_path, validate=lambda state: {"loss": next(scores)})
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdecimal()) == [10, STEPS]
    assert [line["validation_loss"] for line in lines(tmp_path) if "validation_loss" in line] == [3, 1, 2, 4, 5]


def test_only_the_last_is_kept_without_validation(whole):
    assert [p.name for p in (whole[0] / "checkpoints").iterdir() if p.name.isdecimal()] == [str(STEPS)]


@pytest.mark.e2e
@pytest.mark.parametrize("sharded", [False, True], ids=["copies", "sharded"])
def test_four_devices_are_one(sharded, whole, tmp_path):
    state = small_run(tmp_path, 4, shard_parameters=sharded)
    same(state, whole[1], rtol=1e-4, atol=1e-6)
    ours, theirs = ([line["loss"] for line in lines(folder)] for folder in (tmp_path, whole[0]))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    shards = [leaf.addressable_shards[0].data.size / leaf.size for leaf in jax.tree.leaves(state.params)]
    assert shards == ([0.25, 0.25] if sharded else [1, 1])
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == (8, 8)]
    assert moments
    assert all(leaf.addressable_shards[0].data.size * (4 if sharded else 1) == leaf.size for leaf in moments)


@pytest.mark.e2e
def test_what_is_no_number_stops_the_run_and_names_the_step(tmp_path):
    """The state from before it is kept, though the loop only looks every other step."""

    def broken(params, batch, step):
        each, report = small.losses(params, batch, step)
        return jnp.where(step == 12, jnp.nan, each), report

    with pytest.raises(FloatingPointError, match="step 12"):
        small_run(tmp_path, losses=broken)
    assert max(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdecimal()) == 12
    # Mended, it goes on from there and is the run that was never broken.
    same(small_run(tmp_path), small_run(tmp_path / "never"))


def test_images_that_cannot_be_read_are_left_out(tmp_path):
    def load(index, rng):
        if index == 7:
            raise ValueError("broken")
        return small.load(index, rng)

    assert int(small_run(tmp_path, load=load).step) == STEPS


@pytest.mark.e2e
def test_a_full_disk_stops_the_run_with_the_last_checkpoint_intact(tmp_path):
    """It says so and has failed; with room again, it goes on from there and is the run that had room all along."""
    process = start("full", tmp_path)
    _, said = process.communicate()
    assert process.returncode == 1
    assert "File too large" in said
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdecimal()] == ["10"]
    same(small_run(tmp_path, report_every=12), small_run(tmp_path / "never"))


@pytest.mark.parametrize(
    "options", [{"save_every": 0}, {"report_every": 0}, {"ema_decay": 1.0}, {"sample_every": 0}], ids=str
)
def test_options_are_checked(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        RunOptions(1, **options)
