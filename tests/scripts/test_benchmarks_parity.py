"""The benchmarks against diffusers, with narrow networks: both sides do the same, and the processes work together."""

import contextlib
import functools
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

import turns
from peers import channels_first, load_peer
from random_networks import write_random

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


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a benchmark in this process and returns what it prints as JSON. config: of the UNet that is written."""

    def run(name, arguments, config=None):
        @contextlib.contextmanager
        def random_folder(given, component="unet"):
            folder = tmp_path / component
            write_random(str(folder), config or given, component)
            yield str(folder)

        main = runpy.run_path(str(BENCHMARKS / name))["main"]
        monkeypatch.setitem(main.__globals__, "random_folder", random_folder)
        monkeypatch.setitem(main.__globals__, "processes_in_turns", in_this_process)
        main([*arguments, "--rounds", "1"])
        return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith(("{", "["))]

    return run


@pytest.mark.parametrize(
    ("name", "widths", "arguments"),
    [
        ("train", (128, 384), ["--batch", "2", "--steps", "1"]),
        ("lora", (1024, 2048), ["--size", "8", "--rank", "2"]),
    ],
)
def test_both_train_alike(run, monkeypatch, name, widths, arguments):
    context, labels = widths
    config = {**NARROW, "cross_attention_dim": context, "projection_class_embeddings_input_dim": labels}
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # to be set back
    (result,) = run(name, arguments, config)
    assert result["relative_error"] < 1e-5  # of the first loss


def test_both_decode_alike(run):
    (result,) = run("vae", ["--width", "32", "--size", "4"])
    assert result["relative_error"] < 2e-5
    assert list(result["peers"]) == ["diffusers"]


def test_both_embed_alike(run):
    results = run("towers", ["--width", "32"])
    assert [result["what"].split()[0] for result in results] == ["image", "text"]
    for result in results:
        assert result["relative_error"] < 1e-5


def test_both_have_the_same_layers(run):
    """And torch counts work where there are products, and nowhere else."""
    (rows,) = run("layers", ["--width", "32", "--size", "8", "--batch", "1", "--peers", "torch"])
    moved = {"group norm, SiLU", "layer norm", "concatenation", "nearest upsampling"}
    assert {row["kind"] for row in rows if row["unit"] == "GB/s"} == moved
    computed = {"3x3 convolution", "1x1 convolution", "projection", "self-attention", "cross-attention", "GEGLU"}
    assert {row["kind"] for row in rows if row["unit"] == "GFLOP/s"} == computed
    for row in rows:
        assert row["relative_error"]["unclip_jax"] < 1e-5, row
        assert row["amount"] > 0
    with pytest.raises(SystemExit, match=r"--only 'pooling'.*3x3 convolution"):
        run("layers", ["--only", "pooling", "--peers", "torch"])


class Small(torch.nn.Module):
    """Images, and a vector that counts, to images."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, x, scale):
        return self.conv(x) * scale[:, None, None, None]


def small_arrays():
    return [np.random.default_rng(0).standard_normal((2, 6, 4, 3), np.float32), np.array([1, 3])]


@pytest.mark.parametrize("name", ["torch", "torch.compile", "openvino"])
def test_every_peer_gives_what_torch_gives(monkeypatch, name):
    if name == "openvino":
        pytest.importorskip("openvino")  # in no extra of ours: whoever compares with it installs it
    # The compiler itself takes a minute and a C++ compiler.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    arrays = small_arrays()
    with torch.no_grad():
        want = Small()(*channels_first(arrays)).numpy().transpose(0, 2, 3, 1)
    step, facts = load_peer(name, "torch", Small, arrays, "float32")
    for _ in range(2):
        np.testing.assert_allclose(step(), want, rtol=1e-4, atol=1e-5)
    assert facts["gflop"] == pytest.approx(2 * 2 * 6 * 4 * 5 * 27 / 1e9)
    assert facts["threads"] >= 1
    assert facts["library"].lower().startswith(name)


def test_both_call_the_unet_alike_in_processes_of_their_own():
    command = [sys.executable, BENCHMARKS / "unet", "--width", "32", "--size", "8", "--batch", "1", "--rounds", "1"]
    quick = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=quick)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1])["relative_error"] < 1e-5
