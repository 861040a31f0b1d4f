"""The denoising loop of a call: chunks of images through the compiled steps."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from unclip_jax.distributed.mesh import Chunk, make_chunk
from unclip_jax.pipelines.parts import Parts
from unclip_jax.pipelines.request import Conditions, Request
from unclip_jax.progress import Progress
from unclip_jax.sampling.loop import Carry

# Takes a run through some rows of the grid. The carry that it is given is donated: use the one that it returns.
RunSteps = Callable[[Carry, slice], Carry]


def sample_latents(parts: Parts, request: Request[Any], conditions: Conditions) -> np.ndarray:
    """The latents of all images at the end of the loop: (B, h, w, 4) float32, scaled."""
    made = []
    for first in range(0, request.batch, request.batch_size):
        rows = np.arange(first, min(first + request.batch_size, request.batch))
        made.append(
            _sample_chunk(parts, request, conditions, make_chunk(parts.mesh, rows, request.repeats, request.seed))
        )
    return np.concatenate(made)


def stream_states(
    parts: Parts, request: Request[Any], conditions: Conditions
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """All images in one batch: after every evaluation its number from 1, the latents, the estimate of x0."""
    chunk = make_chunk(parts.mesh, np.arange(request.batch), request.repeats, request.seed)
    carry, run_steps = begin(parts, request, conditions, chunk)
    for evaluation in range(request.solver.calls):
        carry = run_steps(carry, slice(evaluation, evaluation + 1))
        yield evaluation + 1, chunk.trim(carry.latents), chunk.trim(carry.x0)


def begin(parts: Parts, request: Request[Any], conditions: Conditions, chunk: Chunk) -> tuple[Carry, RunSteps]:
    """A run before its first step, and the function that takes it through rows of the grid."""
    solver, guidance = request.solver, request.guidance
    labels = None if conditions.labels is None else conditions.labels(chunk)
    channels = None if conditions.channels is None else conditions.channels(chunk)
    known = None if conditions.known is None else conditions.known(chunk)
    carry = conditions.start(chunk)
    unet = parts.weights("unet")
    constants = parts.programs.prepare(
        unet,
        chunk.of_prompts(conditions.text),
        None if conditions.negative is None else chunk.of_prompts(conditions.negative),
        labels,
        chunk.everywhere(np.asarray(solver.grid["timestep"])),
        channels,
        known,
        parts.freeu,
        guidance=guidance,
    )
    columns = _columns(request, chunk, known is not None)

    def run_steps(carry: Carry, rows: slice) -> Carry:
        whole = rows.stop - rows.start == solver.calls
        grid = columns if whole else {name: column[rows] for name, column in columns.items()}
        return parts.programs.run_steps(
            unet, solver, carry, grid, constants, chunk.seed, chunk.indices, guidance=guidance, tile=request.tile
        )

    return carry, run_steps


def _columns(request: Request[Any], chunk: Chunk, puts_back: bool) -> dict[str, jax.Array]:
    """The grid on the devices: the solver's columns, the guidance's strengths, and given noise."""
    grid = request.solver.grid
    columns = {name: chunk.everywhere(np.asarray(column)) for name, column in grid.items()}
    columns |= {name: chunk.by_call(column) for name, column in request.strengths.items()}
    if puts_back:
        # What is known joins the latents at the noise level of the next evaluation, and at the end without noise.
        next_levels = np.append(np.asarray(grid["alpha_cumprod"])[1:], np.float32(1))
        weights = {"known_signal": np.sqrt(next_levels), "known_noise": np.sqrt(1 - next_levels)}
        columns |= chunk.everywhere({name: column for name, column in weights.items() if name not in columns})
    if request.step_noise is not None and request.solver.stochastic:
        columns["step_noise"] = chunk.by_call(request.step_noise)
    return columns


def _sample_chunk(parts: Parts, request: Request[Any], conditions: Conditions, chunk: Chunk) -> np.ndarray:
    calls = request.solver.calls
    carry, run_steps = begin(parts, request, conditions, chunk)
    label = f"sampling {chunk.count} image{'s' * (chunk.count > 1)}"
    with Progress(f"{label} (compiling)", calls, unit="step", enabled=parts.progress) as bar:
        # With somebody watching, a program of one step runs `calls` times; otherwise one program runs them all.
        stride = 1 if parts.progress else calls
        for first in range(0, calls, stride):
            carry = run_steps(carry, slice(first, first + stride))
            if parts.progress:
                jax.block_until_ready(carry.latents)
                bar.stage(label)
            bar.update(stride)
        return chunk.trim(carry.latents)
