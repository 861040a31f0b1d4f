"""One run of the benchmark: what is measured, until when, and the file that every measurement goes into at once."""

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from random_networks import full_size
from turns import in_turns

REPORT = "gpu.json"
# A measurement by its columns.
Row = dict[str, Any]
Add = Callable[[Row], None]


@dataclasses.dataclass(frozen=True)
class Run:
    """What all stages are told.

    Attributes:
        out: the folder of the report.
        width: channels of the UNet's first level, 320 at full size. A narrower run is to try the script: it is made
            smaller in everything, and shallower.
        dtype: of weights and computation.
        steps: of a picture.
        rounds, calls: how often something is timed, and how many calls in a row each time.
        until: when the stage is cut, by `time.time`.
    """

    out: Path
    width: int = 320
    dtype: str = "bfloat16"
    steps: int = 20
    rounds: int = 7
    calls: int = 20
    until: float = math.inf

    @property
    def full_size(self) -> bool:
        return self.width == 320

    @property
    def seconds_left(self) -> float:
        return self.until - time.time()

    def scaled(self, number: int, multiple: int = 8) -> int:
        """A number of the full size for this width: a side, say, or channels."""
        return max(multiple, number * self.width // 320 // multiple * multiple)


def unet_settings(run: Run) -> dict[str, Any]:
    """The UNet's configuration as diffusers has it: `full_size`, and of a narrow run two levels of one layer."""
    config = full_size(run.width)
    if run.full_size:
        return config
    shallow = {name: config[name][:2] for name in ("block_out_channels", "attention_head_dim")}
    return {
        **config,
        **shallow,
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    }


def add_each(run: Run, add: Add, cases: Iterable[tuple[Row, Callable[[], Row], float]]) -> None:
    """Measures case by case, and adds what each is with its figures, or its error.

    Left out is what comes when less time is left than the slowest has taken, or than the case itself needs.

    Args:
        cases: what it is, what measures it, and the seconds that it needs, 0 if that is not known.
    """
    slowest = 0.0
    for row, measure, needs in cases:
        if run.seconds_left < max(slowest, needs):
            add(row | {"left_out": "no time left"})
            continue
        started = time.time()
        try:
            add(row | measure())
        except Exception as error:
            add(row | {"error": first_line(error)})
        slowest = max(slowest, time.time() - started)


def times(ways: Mapping[str, Callable[[], Any]], rounds: int, calls: int = 1) -> dict[str, Row]:
    """Milliseconds of each way, in turns, after one round more. calls: how many of what is timed a way makes."""
    timed = {name: [s * 1e3 / calls for s in seconds[1:]] for name, seconds in in_turns(ways, rounds).items()}
    return {name: {"ms": statistics.median(ms), "min_ms": min(ms), "max_ms": max(ms)} for name, ms in timed.items()}


def read(out: Path) -> dict[str, Any]:
    """The report as it stands; empty before anything was measured."""
    path = out / REPORT
    return json.loads(path.read_text("utf-8")) if path.exists() else {"stages": {}}


def write(out: Path, report: dict[str, Any]) -> None:
    """Under a temporary name first, so that a stage that is cut while it writes leaves what was there."""
    whole = out / f"{REPORT}.new"
    whole.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    whole.replace(out / REPORT)


def note(out: Path, stage: str, **facts: Any) -> None:
    """Sets facts of a stage. Stages run one after the other: nobody else writes."""
    report = read(out)
    report["stages"].setdefault(stage, {"rows": []}).update(facts)
    write(out, report)


def add_row(out: Path, stage: str, row: Row) -> None:
    """Adds a measurement to a stage."""
    report = read(out)
    report["stages"].setdefault(stage, {"rows": []})["rows"].append(row)
    write(out, report)


def first_line(error: BaseException) -> str:
    """An error for a cell of a table."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
