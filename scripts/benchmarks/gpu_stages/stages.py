"""Running stages: each in a process of its own, with a share of the time that is left."""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from gpu_stages.run import Add, Run, add_row, first_line, note, read


class Stage(NamedTuple):
    """measure: what it does, pickled; share: its seconds at full size, in proportion to others'."""

    measure: Callable[[Run, Add], None]
    share: float


def run_stages(stages: Mapping[str, Stage], run: Run, seconds: float) -> None:
    """All of them, one after the other. What a stage does not need is shared by those after it.

    Of a narrow run all shares are the same: most of its time goes into starting and compiling.
    """
    end, shares = time.time() + seconds, [stage.share if run.full_size else 1.0 for stage in stages.values()]
    for number, (name, stage) in enumerate(stages.items()):
        now = time.time()
        until = now + max(0.0, end - now) * shares[number] / sum(shares[number:])
        state = run_stage(name, stage, dataclasses.replace(run, until=until))
        print(f"{name:12} {state} in {time.time() - now:.0f} s", flush=True)


def run_stage(name: str, stage: Stage, run: Run) -> str:
    """ "done", "failed" or "cut", which the report then has, too."""
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(name, stage.measure, run))
    started = time.time()
    process.start()
    process.join(max(0.0, run.seconds_left))
    state = "cut"
    if process.is_alive():
        with contextlib.suppress(ProcessLookupError):  # it may not have come to its session yet
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.kill()
        process.join()
    else:
        state = "failed" if process.exitcode else "done"
    note(run.out, name, state=state, seconds=time.time() - started)
    if state == "failed" and "error" not in read(run.out)["stages"][name]:
        note(run.out, name, error=f"the process ended with status {process.exitcode}")
    return state


def _work(name: str, measure: Callable[[Run, Add], None], run: Run) -> None:
    os.setsid()  # a stage is ended with the processes that it has started
    try:
        measure(run, partial(add_row, run.out, name))
    except Exception as error:
        traceback.print_exc()
        note(run.out, name, error=first_line(error))
        raise SystemExit(1) from None
