"""The denoising loop of a call: chunks of images through the compiled steps."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from unclip_jax.distributed.mesh import Chunk, make_chunk, pad_batch
from unclip_jax.pipelines.control import Control
from unclip_jax.pipelines.parts import Parts
from unclip_jax.pipelines.request import Conditions, Request
from unclip_jax.progress import Progress
from unclip_jax.sampling.guidance import Guidance, guidance_by_call
from unclip_jax.sampling.loop import Carry
from unclip_jax.sampling.solvers.solver import without_grid

# (carry, first, end) -> carry, something that is there when the evaluations first..end are done. The carry that it is
# given is donated: use the one that it returns.
RunSteps = Callable[[Carry, int, int], tuple[Carry, jax.Array]]
# The grid is filled up to a multiple of this, so that one program runs any number of steps.
GRID_ROWS = 2048


def sample_latents(parts: Parts, request: Request[Any], conditions: Conditions) -> np.ndarray:
    """The latents of all images at the end of the loop: (B, h, w, 4) float32, scaled."""
    made = []
    for first in range(0, request.batch, request.batch_size):
        rows = np.arange(first, min(first + request.batch_size, request.batch))
        made.append(_sample_chunk(parts, request, conditions, chunk_of(parts, request, rows)))
    return np.concatenate(made)


def stream_states(
    parts: Parts, request: Request[Any], conditions: Conditions
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """All images in one batch: after every evaluation its number from 1, the latents, the estimate of x0."""
    chunk = chunk_of(parts, request, np.arange(request.batch))
    carry, run_steps = begin(parts, request, conditions, chunk)
    for evaluation in range(request.solver.calls):
        carry, _ = run_steps(carry, evaluation, evaluation + 1)
        yield evaluation + 1, chunk.trim(carry.latents), chunk.trim(carry.x0)


def chunk_of(parts: Parts, request: Request[Any], rows: np.ndarray) -> Chunk:
    """The images of a request with these indices, as a chunk."""
    return make_chunk(parts.mesh, rows, request.repeats, request.seeds, request.indices)


def begin(parts: Parts, request: Request[Any], conditions: Conditions, chunk: Chunk) -> tuple[Carry, RunSteps]:
    """A run before its first step, and the function that takes it through rows of the grid."""
    guidance_of = guidance_by_call(request.guidance, request.strengths, request.solver.calls)
    text = chunk.of_prompts(conditions.text)
    negative = None if conditions.negative is None else chunk.of_prompts(conditions.negative)
    labels = None if conditions.labels is None else conditions.labels(chunk)
    channels = None if conditions.channels is None else conditions.channels(chunk)
    known = None if conditions.known is None else conditions.known(chunk)
    carry = conditions.start(chunk)
    unet, solver = parts.weights("unet"), without_grid(request.solver)
    controls = _controls(parts, request, chunk)
    kinds = [(guidance, request.active_controls(call)) for call, guidance in enumerate(guidance_of)]
    constants = {
        (guidance, active): parts.programs.prepare(
            unet,
            text,
            negative if guidance.unconditional else None,
            labels,
            channels,
            known,
            parts.freeu,
            [controls[number] for number in active],
            guidance=guidance,
        )
        for guidance, active in dict.fromkeys(kinds)
    }
    grids = {guidance: _grid(request, guidance, known is not None, chunk) for guidance in dict.fromkeys(guidance_of)}

    def run_steps(carry: Carry, first: int, end: int) -> tuple[Carry, jax.Array]:
        for (guidance, active), calls in itertools.groupby(range(first, end), kinds.__getitem__):
            numbers = list(calls)
            span = np.int32(numbers[0]), np.int32(numbers[-1] + 1)
            carry, done = parts.programs.run_steps(
                unet,
                solver,
                carry,
                grids[guidance],
                constants[guidance, active],
                chunk.seeds,
                chunk.indices,
                span,
                [controls[number] for number in active],
                guidance=guidance,
                tile=request.tile,
            )
        return carry, done

    return carry, run_steps


def _controls(parts: Parts, request: Request[Any], chunk: Chunk) -> list[Control]:
    """The ControlNets of a request, with their hints for a chunk's images."""
    asked = request.controls
    if asked is None:
        return []
    return [
        Control(
            network=net.network,
            hint=parts.programs.embed_hint(net.network, chunk.of_prompts(hint)),
            column=_scale_of(number),
            guesses=asked.guess_mode,
            graded=asked.guess_mode and not net.config.global_pool_conditions,
        )
        for number, (net, hint) in enumerate(zip(asked.nets, asked.hints, strict=True))
    ]


def _scale_of(number: int) -> str:
    """The grid's column for the scale of a ControlNet."""
    return f"controlnet_conditioning_scale_{number}"


def _grid(request: Request[Any], guidance: Guidance, puts_back: bool, chunk: Chunk) -> dict[str, jax.Array]:
    """The rows of all network evaluations on the devices, and more, up to a number that is the same for most runs."""
    columns = {name: np.asarray(column) for name, column in request.solver.grid.items()}
    if request.deep_cache > 1:
        columns["deep"] = np.arange(request.solver.calls) % request.deep_cache == 0
    if puts_back:
        # What is known joins the latents at the noise level of the next evaluation, and at the end without noise.
        next_levels = np.append(columns["alpha_cumprod"][1:], np.float32(1))
        columns = {"known_signal": np.sqrt(next_levels), "known_noise": np.sqrt(1 - next_levels)} | columns
    size = -(-request.solver.calls // GRID_ROWS) * GRID_ROWS
    grid: dict[str, jax.Array] = chunk.everywhere(pad_batch(columns, size))
    columns_of_images = {name: request.strengths[name] for name in guidance.strengths}
    for number, scale in enumerate(request.controls.scales if request.controls else ()):
        columns_of_images[_scale_of(number)] = scale
    of_images = pad_batch(columns_of_images, size)
    if request.step_noise is not None and request.solver.stochastic:
        of_images["step_noise"] = request.step_noise  # as large as it is
    return grid | {name: chunk.by_call(column) for name, column in of_images.items()}


def _sample_chunk(parts: Parts, request: Request[Any], conditions: Conditions, chunk: Chunk) -> np.ndarray:
    calls = request.solver.calls
    carry, run_steps = begin(parts, request, conditions, chunk)
    if not parts.progress:
        return chunk.trim(run_steps(carry, 0, calls)[0].latents)
    label = f"sampling {chunk.count} image{'s' * (chunk.count > 1)}"
    with Progress(f"{label} (compiling)", calls, unit="step") as bar:
        done = None
        for call in range(calls):
            carry, next_done = run_steps(carry, call, call + 1)
            bar.stage(label)
            # One evaluation behind, so that the devices always have the next one.
            if done is not None:
                jax.block_until_ready(done)
                bar.update()
            done = next_done
        latents = chunk.trim(carry.latents)
        bar.update()
        return latents
