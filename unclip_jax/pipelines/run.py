"""The denoising loop of a call: chunks of images through the compiled steps."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from unclip_jax.distributed.mesh import Chunk, make_chunk
from unclip_jax.pipelines.parts import Parts
from unclip_jax.pipelines.request import Conditions, Request
from unclip_jax.progress import Progress
from unclip_jax.sampling.guidance import guidance_by_call
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
    solver = request.solver
    guidance_of = guidance_by_call(request.guidance, request.strengths, solver.calls)
    text = chunk.of_prompts(conditions.text)
    negative = None if conditions.negative is None else chunk.of_prompts(conditions.negative)
    labels = None if conditions.labels is None else conditions.labels(chunk)
    channels = None if conditions.channels is None else conditions.channels(chunk)
    known = None if conditions.known is None else conditions.known(chunk)
    timesteps = chunk.everywhere(np.asarray(solver.grid["timestep"]))
    carry = conditions.start(chunk)
    unet = parts.weights("unet")
    constants = {
        guidance: parts.programs.prepare(
            unet,
            text,
            negative if guidance.unconditional else None,
            labels,
            timesteps,
            channels,
            known,
            parts.freeu,
            guidance=guidance,
        )
        for guidance in dict.fromkeys(guidance_of)
    }
    columns, by_image = _columns(request, known is not None)

    def run_steps(carry: Carry, rows: slice) -> Carry:
        whole = rows.stop - rows.start == solver.calls
        for guidance, calls in itertools.groupby(range(rows.start, rows.stop), guidance_of.__getitem__):
            first, *_ = numbers = list(calls)
            end = first + len(numbers)
            # All rows, so that one program runs every segment with this guidance, however long it is; or some, cut on
            # the host, where that compiles nothing.
            span = (np.int32(first), np.int32(end)) if whole else None
            cut = slice(None) if whole else slice(first, end)
            grid = chunk.everywhere({name: column[cut] for name, column in columns.items()})
            of_images = by_image | {name: request.strengths[name] for name in guidance.strengths}
            grid |= {name: chunk.by_call(column[cut]) for name, column in of_images.items()}
            carry = parts.programs.run_steps(
                unet,
                solver,
                carry,
                grid,
                constants[guidance],
                chunk.seed,
                chunk.indices,
                span,
                guidance=guidance,
                tile=request.tile,
            )
        return carry

    return carry, run_steps


def _columns(request: Request[Any], puts_back: bool) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The grid, but for the guidance's strengths: the columns for all images, (calls,), and those of given noise."""
    columns = {name: np.asarray(column) for name, column in request.solver.grid.items()}
    if puts_back:
        # What is known joins the latents at the noise level of the next evaluation, and at the end without noise.
        next_levels = np.append(columns["alpha_cumprod"][1:], np.float32(1))
        columns = {"known_signal": np.sqrt(next_levels), "known_noise": np.sqrt(1 - next_levels)} | columns
    if request.step_noise is None or not request.solver.stochastic:
        return columns, {}
    return columns, {"step_noise": request.step_noise}


def _sample_chunk(parts: Parts, request: Request[Any], conditions: Conditions, chunk: Chunk) -> np.ndarray:
    calls = request.solver.calls
    carry, run_steps = begin(parts, request, conditions, chunk)
    label = f"sampling {chunk.count} image{'s' * (chunk.count > 1)}"
    with Progress(f"{label} (compiling)", calls, unit="step", enabled=parts.progress) as bar:
        # With somebody watching, a program of one step runs `calls` times; otherwise one runs all with equal guidance.
        stride = 1 if parts.progress else calls
        for first in range(0, calls, stride):
            carry = run_steps(carry, slice(first, first + stride))
            if parts.progress:
                jax.block_until_ready(carry.latents)
                bar.stage(label)
            bar.update(stride)
        return chunk.trim(carry.latents)
