"""The benchmarks against diffusers, with narrow networks: both sides do the same, and the processes work together."""

import contextlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import turns
from unet_weights import write_random

pytestmark = pytest.mark.parity

BENCHMARKS = Path(__file__).parents[2] / "scripts" / "benchmarks"
NARROW = {"block_out_channels": [32, 32], "attention_head_dim": [1, 2], "layers_per_block": 1, "norm_num_groups": 8}
NARROW |= {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "use_linear_projection": True}
NARROW |= {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "class_embed_type": "projection"}


def in_this_process(loads, rounds, *, steps=1, alone=False):
    """Each side's steps, without taking turns."""
    sides = {}
    for name, load in loads.items():
        step, facts = load()
        sides[name] = turns.Side({**facts, "load_s": 0.0}, step(), [1.0] * rounds, 1.0)
        for _ in range(steps):
            step()
    return sides


@pytest.mark.parametrize(
    ("name", "widths", "arguments"),
    [
        ("train", (128, 384), ["--batch", "2", "--steps", "1"]),
        ("lora", (1024, 2048), ["--size", "8", "--rank", "2"]),
    ],
)
def test_both_train_alike(tmp_path, monkeypatch, capsys, name, widths, arguments):
    context, labels = widths
    config = {**NARROW, "cross_attention_dim": context, "projection_class_embeddings_input_dim": labels}

    @contextlib.contextmanager
    def random_folder(_):
        write_random(str(tmp_path), config)
        yield str(tmp_path)

    main = runpy.run_path(str(BENCHMARKS / name))["main"]
    monkeypatch.setitem(main.__globals__, "random_folder", random_folder)
    monkeypatch.setitem(main.__globals__, "processes_in_turns", in_this_process)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # to be set back
    main([*arguments, "--rounds", "1"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    assert json.loads(line)["relative_error"] < 1e-5  # of the first loss


def test_both_call_the_unet_alike_in_processes_of_their_own():
    command = [sys.executable, BENCHMARKS / "unet", "--width", "32", "--size", "8", "--batch", "1", "--rounds", "1"]
    quick = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=quick)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1])["relative_error"] < 1e-5
