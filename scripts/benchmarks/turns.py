"""Taking turns: what is compared runs round by round, so that a machine whose speed drifts slows all of it alike."""

import contextlib
import ctypes
import dataclasses
import gc
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
        try:
            sides[name] = Side(*ours.recv())  # so that each loads alone
        except EOFError:
            raise SystemExit(f"{name} could not be loaded; its process wrote why") from None

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
    _return_freed_memory()
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


def _return_freed_memory() -> None:
    """What loading has left on the heap is not the step's (glibc; elsewhere it stays).

    Not the library's own function for it, whose import would bring JAX into the peers' processes.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


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


def torch_facts(library: str = "diffusers") -> dict[str, Any]:
    """The same of a step in torch. library: whose network it is, or what compiles it."""
    import torch

    return {"library": f"{library} on torch {torch.__version__.partition('+')[0]}", "threads": torch.get_num_threads()}


def report(what: str, sides: Mapping[str, Side]) -> None:
    """Prints a table of "unclip_jax" and its peers, and a line of JSON.

    Outputs are compared with the first peer's, whose figures the line of JSON has once more under its own keys.
    GFLOP/s are of the same work for all: as the first peer counts it, or else our compiler.
    """
    ours = sides["unclip_jax"]
    peers = {name: side for name, side in sides.items() if side is not ours}
    reference = next(iter(peers))
    gflop = {**ours.facts, **peers[reference].facts}["gflop"]
    print(
        f"{ours.facts['device']}, {os.cpu_count()} cores, {platform.machine()}; {what}, {len(ours.seconds)} rounds; "
        f"commit {commit()}"
    )
    print(
        f"{'':30}{'median s':>10}{'min s':>9}{'max s':>9}{'GFLOP/s':>9}{'peak GiB':>10}{'load s':>8}"
        f"{'ours is':>9}{'by pairs':>14}{'memory':>8}{'difference':>12}"
    )
    compared = {name: _compare(ours, side) for name, side in peers.items()}
    for name, side in sides.items():
        row = (
            f"{side.facts['library']:30.30}{statistics.median(side.seconds):10.3f}{min(side.seconds):9.3f}"
            f"{max(side.seconds):9.3f}{gflop / statistics.median(side.seconds):9.0f}{side.peak:10.2f}"
            f"{side.facts['load_s']:8.1f}"
        )
        if name in peers:
            low, high = compared[name]["speed_ratio_range"]
            pairs = f"{low:.2f}..{high:.2f}"
            row += f"{compared[name]['speed_ratio']:8.2f}x{pairs:>14}{compared[name]['peak_memory_ratio']:7.2f}x"
        else:
            row += " " * 31
        print(row + ("" if name == reference else f"{difference(side.first, peers[reference].first):12.1e}"))
    print(
        "ours is: so many times as fast, and takes so many times the memory; difference: relative L2 from "
        f"{reference}'s output"
    )
    figures = {name: {**_figures(side, gflop), **compared.get(name, {})} for name, side in sides.items()}
    result = {
        **compared[reference],
        "compile_s": ours.facts["compile_s"],
        "what": what,
        "gflop": gflop,
        "unclip_jax": figures.pop("unclip_jax"),
        "peers": figures,
    }
    print(json.dumps(result))


def commit() -> str:
    """The short name of the commit that is checked out; "unknown" away from a clone."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    try:
        asked = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent)
    except FileNotFoundError:
        return "unknown"
    return asked.stdout.strip() or "unknown"


def _compare(ours: Side, theirs: Side) -> dict[str, Any]:
    by_pairs = ratios(theirs.seconds, ours.seconds)
    return {
        "speed_ratio": statistics.median(by_pairs),
        "speed_ratio_range": [min(by_pairs), max(by_pairs)],
        "peak_memory_ratio": ours.peak / theirs.peak,
        "relative_error": difference(ours.first, theirs.first),
    }


def _figures(side: Side, gflop: float) -> dict[str, Any]:
    median = statistics.median(side.seconds)
    return {
        "library": side.facts["library"],
        "threads": side.facts.get("threads"),
        "median_s": median,
        "range_s": [min(side.seconds), max(side.seconds)],
        "gflop_per_s": gflop / median,
        "peak_gib": side.peak,
    }


def difference(got: Any, want: Any) -> float:
    """Relative L2 of two arrays."""
    there, here = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(there - here) / np.linalg.norm(here))
