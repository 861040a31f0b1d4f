"""The report for people: a table of each stage beside what was predicted, and the bounds that have to hold."""

from typing import Any, NamedTuple

from gpu_stages.run import Row

# Milliseconds of a guided step on an H200 by latents and batch, computed from FLOPs and rates of published kernels.
PREDICTED_MS = {(64, 1): 7.5, (64, 8): 32.0, (64, 32): 116.0, (96, 1): 17.0, (96, 8): 86.0, (96, 32): 315.0}
# TFLOP/s of dense products in half precision, as the maker states them; of the H100 its SXM form.
PEAKS = {"H200": 990, "H100": 990, "A100": 312, "L4": 121, "T4": 65}
# Figures that are for the bounds alone.
_HIDDEN = ("wants_kernel", "bound")


class Gate(NamedTuple):
    """A bound, what was measured, and "held", "FAILED" or "not for this run"."""

    what: str
    want: str
    got: str
    verdict: str


def markdown(report: dict[str, Any]) -> str:
    """The whole report."""
    lines = [
        f"# {fact(report, 'device') or 'No device'}",
        "",
        f"`scripts/benchmarks/gpu`, width {report['width']}, {report['dtype']}, commit {report['commit']}, "
        f"{report['begun']}. Times are medians; predictions are for an H200, of before anything was measured.",
    ]
    for name, stage in report["stages"].items():
        lines += ["", f"## {name}", "", f"{stage['state']}, {stage['seconds']:.0f} s"]
        if "error" in stage:
            lines[-1] += f": {stage['error']}"
        rows = unet_rows(report) if name == "unet" else stage["rows"]
        lines += ["", *table(rows)] if rows else []
    lines += ["", "## Bounds", "", *table([gate._asdict() for gate in gates(report)])]
    return "\n".join(lines) + "\n"


def table(rows: list[Row]) -> list[str]:
    """Markdown, with the columns in the order in which they come up."""
    columns = [name for name in dict.fromkeys(key for row in rows for key in row) if name not in _HIDDEN]
    cells = [[cell(row.get(column)) for column in columns] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *cells)]


def cell(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value).replace("|", "\\|").replace("\n", " ")
    if 0 < abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def fact(report: dict[str, Any], what: str) -> Any:
    """One of the first stage's; None where it has not got there."""
    rows = report["stages"].get("facts", {"rows": []})["rows"]
    return next((row["value"] for row in rows if row["what"].startswith(what)), None)


def unet_rows(report: dict[str, Any]) -> list[Row]:
    """With the shares of the device's two ceilings, as stated (mfu) and as measured, and the predictions."""
    words = str(fact(report, "device")).replace("-", " ").split()
    peak = next((PEAKS[word] for word in words if word in PEAKS), None)
    ceiling, rows = fact(report, "products"), []
    for row in report["stages"].get("unet", {"rows": []})["rows"]:
        speed = row["gflop"] / row["ms"] if "gflop" in row and "ms" in row else None
        predicted = PREDICTED_MS[row["latents"], row["batch"]] if "gflop" in row else None
        first = {name: row[name] for name in ("latents", "batch", "ms") if name in row}
        shares = {
            "predicted_ms": predicted,
            "mfu": speed / peak if speed and peak else None,
            "of_ceiling": speed / ceiling if speed and ceiling else None,
        }
        rows.append(first | shares | row)
    return rows


def gates(report: dict[str, Any]) -> list[Gate]:
    """The bounds of exactness, for any device, and those of speed, for a GPU at full size."""
    judged = []
    for name, stage in report["stages"].items():
        wrong = [stage["error"]] if "error" in stage else [row["error"] for row in stage["rows"] if "error" in row]
        judged.append(Gate(f"{name}: errors", "none", "; ".join(dict.fromkeys(wrong)) or "none", _verdict(not wrong)))
        for row in stage["rows"]:
            if row.get("bound") is not None and "relative_l2" in row:
                what = ", ".join(str(row[key]) for key in ("what", "dtype", "shape", "rows") if key in row)
                far = row["relative_l2"]
                held = _verdict(far <= row["bound"])
                judged.append(Gate(f"{name}: {what}", f"<= {row['bound']:.0e}", f"{far:.1e}", held))
    return judged + _speed_gates(report)


def _speed_gates(report: dict[str, Any]) -> list[Gate]:
    stages = report["stages"]
    applies = fact(report, "platform") == "gpu" and report["width"] == 320
    rows = stages.get("attention", {"rows": []})["rows"]
    without = [row["shape"] for row in rows if row.get("wants_kernel") and row["kernel"] != "cudnn"]
    fair = next((r for r in unet_rows(report) if (r["latents"], r["batch"]) == (64, 8) and "ms" in r), {})
    theirs = next((r["ms"] for r in stages.get("torch", {"rows": []})["rows"] if _is_compiled(r) and "ms" in r), None)
    ours = fair.get("ms")
    waits = fair["one_by_one_ms"] / ours - 1 if ours else None

    def gate(what: str, want: str, got: float | None, held: bool | None) -> Gate:
        return Gate(what, want, "not measured" if got is None else cell(got), _verdict(held if applies else None))

    def at_most(what: str, bound: float, got: float | None) -> Gate:
        return gate(what, f"<= {bound:g}", got, got is not None and got <= bound)

    mfu = fair.get("mfu")
    return [
        gate("attention: shapes of cuDNN's without it", "0", float(len(without)), bool(rows) and not without),
        gate("unet, 64x64, batch 8: MFU", ">= 0.3", mfu, mfu is not None and mfu >= 0.3),
        at_most("unet, 64x64, batch 8: the host's part of a step watched", 0.05, waits),
        at_most("unet, 64x64, batch 8: MiB of weights moved", 100, fair.get("moved_weights_mib")),
        at_most("unet, 64x64, batch 8: ms by those of torch.compile", 1.15, ours / theirs if ours and theirs else None),
    ]


def _is_compiled(row: Row) -> bool:
    return (row["what"], row.get("latents"), row.get("rows")) == ("UNet, compiled", 64, 16)


def _verdict(held: bool | None) -> str:
    return "not for this run" if held is None else "held" if held else "FAILED"
