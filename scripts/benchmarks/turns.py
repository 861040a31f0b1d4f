"""Taking turns: what is compared runs round by round, so that a machine whose speed drifts slows all of it alike."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Step = Callable[[], np.ndarray]
# Loads a library and its network: a step to be timed, and facts for the table. Pickled, to run in a process of its own.
Load = Callable[[], tuple[Step, dict[str, Any]]]


@dataclasses.dataclass
class Side:
    """What was measured of one library. first: what its first step gave; seconds: of a step, by rounds; peak: GiB."""

    facts: dict[str, Any]
    first: np.ndarray
    seconds: list[float] = dataclasses.field(default_factory=list)
    peak: float = 0.0


def in_turns(ways: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in this process, `rounds` + 1 of them: the first ones hold the compilation.

    A way returns when its arrays are ready.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, run in ways.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Round by round, for their median: a drift of the machine is in both of a pair."""
    return [a / b for a, b in zip(over, under, strict=True)]


def processes_in_turns(
    loads: Mapping[str, Load], rounds: int, *, steps: int = 1, alone: bool = False
) -> dict[str, Side]:
    """Each library in a process of its own, some steps a turn. alone: one after the other, to save memory."""
    context = multiprocessing.get_context("spawn")
    sides: dict[str, Side] = {}
    running: dict[str, tuple[Any, Any]] = {}

    def start(name: str) -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, loads[name], steps), daemon=True)
        process.start()
        theirs.close()
        running[name] = ours, process
        sides[name] = Side(*ours.recv())  # so that each loads alone

    def turn(name: str) -> None:
        pipe, side = running[name][0], sides[name]
        pipe.send(True)
        seconds, side.peak = pipe.recv()
        side.seconds.append(seconds)

    def end(name: str) -> None:
        pipe, process = running[name]
        pipe.send(False)
        process.join()

    for group in [[name] for name in loads] if alone else [list(loads)]:
        for name in group:
            start(name)
        for _ in range(rounds):
            for name in group:
                turn(name)
        for name in group:
            end(name)
    return sides


def _work(pipe: Any, load: Load, steps: int) -> None:
    """Loads, then makes some steps for every True, answering with the seconds of one and the peak; False ends it."""
    started = time.perf_counter()
    step, facts = load()
    facts["load_s"] = time.perf_counter() - started
    _reset_peak()
    pipe.send((facts, step()))
    while pipe.recv():
        started = time.perf_counter()
        for _ in range(steps):
            step()
        pipe.send(((time.perf_counter() - started) / steps, _peak_gib()))


def _peak_gib() -> float:
    """The most resident memory since `_reset_peak` (Linux; elsewhere since the start)."""
    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30


def _reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def compiled_facts(compiled: Any, started: float) -> dict[str, Any]:
    """What the table needs to know of our compiled step. started: when its compilation began."""
    import jax

    return {
        "library": f"unclip_jax on jax {jax.__version__}",
        "device": jax.devices()[0].device_kind,
        "compile_s": time.perf_counter() - started,
        "gflop": compiled.cost_analysis()["flops"] / 1e9,
        "temporaries_gib": compiled.memory_analysis().temp_size_in_bytes / 2**30,
    }


def torch_facts() -> dict[str, Any]:
    """The same of a step in diffusers."""
    import torch

    return {"library": f"diffusers on torch {torch.__version__}", "threads": torch.get_num_threads()}


def report(what: str, sides: Mapping[str, Side]) -> None:
    """Prints a table of "unclip_jax" and "diffusers" with their ratios, and a line of JSON."""
    ours, theirs = sides["unclip_jax"], sides["diffusers"]
    error = np.linalg.norm(ours.first - theirs.first) / np.linalg.norm(theirs.first)
    by_pairs = ratios(theirs.seconds, ours.seconds)
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    facts = ours.facts
    print(
        f"{facts['device']}, {os.cpu_count()} cores, {platform.machine()}; {what}, {len(by_pairs)} rounds; "
        f"commit {commit}"
    )
    print(f"{'':28}{'median s':>10}{'min s':>8}{'max s':>8}{'GFLOP/s':>10}{'step peak GiB':>15}{'load s':>8}")
    for side in sides.values():
        median = statistics.median(side.seconds)
        print(
            f"{side.facts['library']:28.28}{median:10.3f}{min(side.seconds):8.3f}{max(side.seconds):8.3f}"
            f"{facts['gflop'] / median:10.0f}{side.peak:15.2f}{side.facts['load_s']:8.1f}"
        )
    result = {
        "speed_ratio": statistics.median(by_pairs),
        "speed_ratio_range": [min(by_pairs), max(by_pairs)],
        "peak_memory_ratio": ours.peak / theirs.peak,
        "relative_error": float(error),
        "compile_s": facts["compile_s"],
    }
    print(
        f"unclip_jax is {result['speed_ratio']:.2f}x as fast ({min(by_pairs):.2f}..{max(by_pairs):.2f} by pairs), "
        f"with {result['peak_memory_ratio']:.2f}x the memory; outputs differ by {error:.1e} (relative L2)"
    )
    print(json.dumps(result))
