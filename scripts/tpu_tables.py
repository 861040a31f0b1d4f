"""What `scripts/compile_for` has found, as lines and as the tables of a page."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

MIB = 2**20
BEGIN, END = "<!-- scripts/compile_for writes from here -->", "<!-- to here -->"


class Chip(NamedTuple):
    """gigabytes: of memory. gigahertz: of the clock whose cycles the compiler estimates."""

    gigabytes: int
    gigahertz: float


CHIPS = {"v5e": Chip(16, 1.5), "v5p": Chip(95, 1.75), "v6e": Chip(32, 1.75)}
COLUMNS = (
    *("compiled in s", "arguments MiB", "temporaries MiB", "of the memory", "GFLOP", "estimated ms"),
    *("without an estimate", "collectives", "copies MiB", "of arguments"),
)
WHAT = ("model", "size", "levels", "topology", "mesh", "dtype", "batch")


def cells(result: Mapping[str, Any]) -> list[str]:
    """The columns of a program."""
    if result["error"] is not None:
        return [f"fails: {result['error']}".replace("|", "\\|"), *[""] * (len(COLUMNS) - 1)]
    chip = CHIPS[result["topology"].split(":")[0]]
    held = result["arguments"] + result["temporaries"]
    moved = [f"{count} {kind} {size / MIB:,.1f} MiB" for kind, (count, size) in sorted(result["collectives"].items())]
    return [
        f"{result['seconds']:.0f}",
        f"{result['arguments'] / MIB:,.1f}",
        f"{result['temporaries'] / MIB:,.1f}",
        f"{held / chip.gigabytes / 1e7:.0f} %",
        f"{result['flop'] / 1e9:,.0f}",
        f"{result['cycles'] / chip.gigahertz / 1e6:.2f}",
        f"{result['kernels']} kernels, {result['grid']:,} blocks" if result["kernels"] else "",
        ", ".join(moved),
        f"{result['copied'] / MIB:,.1f}",
        f"{result['copied_arguments'] / MIB:,.1f}",
    ]


def line(result: Mapping[str, Any]) -> str:
    """One result for a terminal."""
    if result["error"] is not None:
        return f"FAILS after {result['seconds']:.0f} s: {result['error']}"
    return "; ".join(f"{name} {cell}" for name, cell in zip(COLUMNS, cells(result), strict=True) if cell)


def tables(results: list[dict[str, Any]]) -> str:
    """Those of all results, the newest of each program."""
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(tuple(result[name] for name in WHAT), {})[result["program"]] = result
    head = f"| program | {' | '.join(COLUMNS)} |\n|{' --- |' * (len(COLUMNS) + 1)}"
    parts = []
    for (model, size, levels, topology, mesh, dtype, batch), programs in groups.items():
        depth = "" if levels is None else f", {levels} level{'s' * (levels > 1)} of its networks"
        devices = "one device" if mesh == "1" else f"all devices along {mesh.replace(',', ' and ')}"
        parts.append(f"### {model}{depth}: {topology}, {devices}, {dtype}, {size}x{size} latents, batch {batch}\n")
        rows = [f"| {name} | {' | '.join(cells(result))} |" for name, result in programs.items()]
        parts.append("\n".join([head, *rows]) + "\n")
    return "\n".join(parts)


def write_report(page: Path, results: Path) -> None:
    """Writes the tables of all lines of `results` between the marks of a page."""
    text = page.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    lines = [json.loads(line) for line in results.read_text("utf-8").splitlines()]
    page.write_text(f"{before}{BEGIN}\n\n{tables(lines)}\n{END}{after}", "utf-8")
