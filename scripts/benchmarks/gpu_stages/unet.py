"""The guided step of a pipeline, by size and batch: compilation, milliseconds, memory, what its program holds."""

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpu_stages.program import program_facts
from gpu_stages.random_pipeline import arguments, begun, random_pipeline
from gpu_stages.run import Add, Row, Run, first_line, times
from unclip_jax import UnCLIPPipeline

# Latents and batches whose programs are compiled together; the first is the fair test, and is measured first.
GROUPS = (((64, 8), (64, 1)), ((96, 8), (96, 1)), ((64, 32),), ((96, 32),))
# An evaluation of one row, an image without guidance: products, convolutions and attention by their definitions.
GFLOP = {64: 800.3, 96: 2145.2}


def measure(run: Run, add: Add) -> None:
    pipe, slowest = random_pipeline(run), 0.0
    for group in GROUPS:
        if run.seconds_left < slowest:
            for latents, batch in group:
                add({"latents": latents, "batch": batch, "left_out": "no time left"})
            continue
        started = time.time()
        with ThreadPoolExecutor() as pool:
            # Tracing holds Python's lock, compiling does not.
            lowered = [attempt(lower, pipe, run, *size) for size in group]
            compiled = [pool.submit(attempt, compile_it, one) for one in lowered]
        for (latents, batch), one in zip(group, compiled, strict=True):
            row: Row = {"latents": latents, "batch": batch}
            measured = attempt(timed, run, one.result())
            if run.full_size:
                row["gflop"] = 2 * batch * GFLOP[latents]
            add(row | (measured if isinstance(measured, dict) else {"error": first_line(measured)}))
        slowest = max(slowest, time.time() - started)


def attempt(function: Callable[..., Any], *given: Any) -> Any:
    """The result, or the error, also one that was given: one size that does not fit is not to end the others."""
    errors = [one for one in given if isinstance(one, Exception)]
    try:
        return errors[0] if errors else function(*given)
    except Exception as error:
        return error


@dataclasses.dataclass(frozen=True)
class Step:
    """A run's program and what it is called with; lowered, then compiled."""

    program: Any
    given: list[Any]
    facts: Row


def lower(pipe: UnCLIPPipeline, run: Run, latents: int, batch: int) -> Step:
    """The program that a pipeline's call would run its steps by, with the arguments that it would have."""
    caught: dict[str, Any] = {}

    def catch(*given: Any, **static: Any) -> tuple[Any, Any]:
        caught.update(given=list(given), static=static)
        return given[2], None

    programs = dataclasses.replace(pipe.programs, run_steps=catch)
    parts = dataclasses.replace(pipe.parts, programs=programs)
    carry, run_steps = begun(pipe, parts, arguments(run, run.scaled(latents), batch))
    run_steps(carry, 0, 1)
    started = time.time()
    lowered = pipe.programs.run_steps.lower(*caught["given"], **caught["static"])
    return Step(lowered, caught["given"], {"trace_s": time.time() - started})


def compile_it(step: Step) -> Step:
    started = time.time()
    program = step.program.compile()
    return Step(program, step.given, step.facts | {"compile_s": time.time() - started})


def timed(run: Run, step: Step) -> Row:
    """Steps in one call, as without a bar, and one call each, as with one: what lies between is the host's time."""
    unet, solver, carry, *rest, _, controls = step.given
    steps = max(2, run.steps // (1 + len(carry.latents) // 8))  # of large batches fewer

    def call(carry: Any, first: int, end: int) -> tuple[Any, Any]:
        return step.program(unet, solver, carry, *rest, (np.int32(first), np.int32(end)), controls)

    def fresh() -> Any:
        return jax.tree.map(jnp.copy, carry)  # what a call is given is donated

    def together() -> None:
        jax.block_until_ready(call(fresh(), 0, steps))

    def one_by_one() -> None:
        now, done = fresh(), None
        for number in range(steps):
            now, following = call(now, number, number + 1)
            jax.block_until_ready(done)  # one step behind, as `pipelines/run.py` is
            done = following
        jax.block_until_ready(now)

    figures = times({"together": together, "one_by_one": one_by_one}, run.rounds, steps)
    memory, stats = step.program.memory_analysis(), jax.devices()[0].memory_stats() or {}
    return {
        **step.facts,
        **figures["together"],
        "one_by_one_ms": figures["one_by_one"]["ms"],
        "arguments_gib": memory.argument_size_in_bytes / 2**30,
        "temporaries_gib": memory.temp_size_in_bytes / 2**30,
        "peak_gib": stats.get("peak_bytes_in_use", 0) / 2**30,  # of the process until now
        **program_facts(step.program.as_text()),
    }
