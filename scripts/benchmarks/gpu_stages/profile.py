"""Where the time of three steps goes, kernel by kernel, from JAX's profiler."""

import collections
import gzip
import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from gpu_stages.random_pipeline import arguments, begun, random_pipeline
from gpu_stages.run import Add, Run

STEPS = 3
LATENTS, BATCH = 64, 8
TOP = 10
# The first that is found in a kernel's name, in this order: convolutions of cuDNN are named implicit_gemm.
KINDS = {
    "attention": r"fmha|flash|sdpa",
    "convolution": r"conv(?!ert)|implicit|fprop|winograd",
    "product": r"gemm|cublas|nvjet|cutlass|dot|ynn",
    "copy, transposition": r"copy|transpose|memcpy|memset|concatenate",
    "reduction": r"reduce|norm",
}


def measure(run: Run, add: Add) -> None:
    pipe = random_pipeline(run)
    carry, run_steps = begun(pipe, pipe.parts, arguments(run, run.scaled(LATENTS), BATCH))
    carry, done = run_steps(carry, 0, 1)
    jax.block_until_ready(done)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            carry, done = run_steps(carry, 1, 1 + STEPS)
            jax.block_until_ready((carry, done))
        traces = list(Path(folder).rglob("*.trace.json.gz"))
        events = json.loads(gzip.decompress(traces[0].read_bytes()))["traceEvents"]
    for row in summary(kernels(events), STEPS):
        add(row)


def kernels(events: Iterable[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """(name, start, end) in microseconds: what ran on the device's streams; on a CPU, on XLA's threads."""
    events = list(events)
    processes = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    devices = {pid for pid, name in processes.items() if "/device:" in name}

    def is_kernel(event: Mapping[str, Any]) -> bool:
        thread = threads.get((event["pid"], event["tid"]), "")
        if devices:
            return event["pid"] in devices and "Stream" in thread
        return "hlo_op" in event.get("args", {})

    ran = [e for e in events if e.get("ph") == "X" and is_kernel(e)]
    return [(e["name"], e["ts"], e["ts"] + e["dur"]) for e in ran]


def summary(ran: list[tuple[str, float, float]], steps: int) -> list[dict[str, Any]]:
    """Rows of milliseconds a step: by kind, the time when nothing ran, the kernels that took the most."""
    by_name: dict[str, float] = collections.defaultdict(float)
    by_kind: dict[str, float] = collections.defaultdict(float)
    for name, start, end in ran:
        by_name[name] += end - start
        by_kind[kind_of(name)] += end - start
    whole = max(end for *_, end in ran) - min(start for _, start, _ in ran)
    by_kind["nothing runs"] = whole - _covered(ran)

    def row(name: str, us: float) -> dict[str, Any]:
        return {"what": name, "ms": us / steps / 1e3, "share": us / whole}

    def most(times: dict[str, float]) -> list[tuple[str, float]]:
        return sorted(times.items(), key=lambda item: -item[1])

    kinds = [row(name, us) for name, us in most(by_kind)]
    return [*kinds, *(row(f"kernel {name}", us) for name, us in most(by_name)[:TOP])]


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "elementwise")


def _covered(ran: list[tuple[str, float, float]]) -> float:
    """Microseconds in which at least one of them runs."""
    total, until = 0.0, float("-inf")
    for _, start, end in sorted(ran, key=lambda one: one[1]):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
