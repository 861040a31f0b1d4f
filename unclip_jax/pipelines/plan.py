"""What a run will need of a device's memory, known from the compiled programs before anything runs."""

import dataclasses
import itertools
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from unclip_jax.checkpoints.checkpoint import Checkpoint
from unclip_jax.distributed import mesh as placement
from unclip_jax.pipelines.auto import pipeline_for
from unclip_jax.pipelines.checks import MAX_IMAGES, check_integer, check_latent_shape
from unclip_jax.pipelines.lowering import Lowerable, around_the_loop, parameters, shaped, the_loop
from unclip_jax.pipelines.memory import Memory
from unclip_jax.pipelines.opening import DEFAULT_MEMORY
from unclip_jax.pipelines.pipeline import Pipeline
from unclip_jax.pipelines.prepared import may_transform, transformed_specs
from unclip_jax.progress import Progress

STAGES = [
    ("image_encoder", "encoding images"),
    ("depth_estimator", "estimating depth"),
    ("text_encoder", "encoding prompts"),
    ("unet", "sampling"),
    ("vae", "decoding"),
]


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one stage of a run holds on a device at its peak, in bytes: weights, and everything else."""

    name: str
    weights: int
    activations: int

    @property
    def peak(self) -> int:
        return self.weights + self.activations


def plan(
    checkpoint: Checkpoint,
    height: int | None,
    width: int | None,
    batch: int,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    memory: Memory = DEFAULT_MEMORY,
) -> list[Stage]:
    """The stages of making `batch` guided images at once, in order.

    The programs are compiled and nothing is run, nor are weights read. What the process needs beside its arrays is not
    in it: Python, JAX, the programs themselves. Where `Memory.convolution` is None and the pipeline would look at what
    is free, the plan is that of "winograd".

    Args:
        checkpoint: An open checkpoint of the family.
        height, width: In pixels; None: the checkpoint's own size.
        batch: Images at once.
        dtype, mesh, memory: As for the checkpoint's pipeline.

    Raises:
        ValueError: For arguments that the pipeline refuses.
    """
    mesh = placement.local_mesh() if mesh is None else placement.check_mesh(mesh)
    abstract = dataclasses.replace(memory, free_networks=True)
    pipe = pipeline_for(checkpoint).from_checkpoint(checkpoint, dtype, mesh, abstract)
    latent_shape = check_latent_shape(pipe.config, height, width)
    batch = check_integer("batch", batch, 1, MAX_IMAGES)
    return _stages(pipe, latent_shape, batch, memory)


def _stages(pipe: Pipeline, latent_shape: tuple[int, int, int], batch: int, memory: Memory) -> list[Stage]:
    config, mesh = pipe.config, pipe.mesh
    weights = parameters(config, pipe.networks, mesh)
    held = {part: sum(map(_bytes, arrays.values())) for part, arrays in weights.items()}
    # Of each parameter, what a device holds of it and its share of the host's copy.
    share = len(mesh.local_devices)
    sizes = {
        part: [(_bytes(array), math.prod(array.shape) * array.dtype.itemsize / share) for array in arrays.values()]
        for part, arrays in weights.items()
    }
    transformed: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
    if may_transform(mesh, pipe.dtype, memory):
        whole = placement.replicated(mesh)
        for part, specs in transformed_specs(pipe.networks).items():
            transformed[part] = {name: shaped(spec.shape, whole) for name, spec in specs.items()}
            weights[part] |= transformed[part]
    beside: dict[str, int] = {}

    def compiled(program: Lowerable) -> Any:
        """Compiles a program; what it holds beside the weights is what it is given, makes, and works in."""
        made = program.lower().compile()
        sizes = made.memory_analysis()
        made_and_worked_in = sizes.output_size_in_bytes - sizes.alias_size_in_bytes + sizes.temp_size_in_bytes
        needed = made_and_worked_in + sum(map(_bytes, program.arrays))
        beside[program.part] = max(beside.get(program.part, 0), needed)
        bar.update()
        return made

    family = (config, pipe.programs, mesh, weights)
    programs = around_the_loop(*family, latent_shape, batch)
    if config.task not in ("depth-to-image", "inpaint", "instruct"):
        del programs["vae_encode"]
    with Progress("compiling the programs", len(programs) + 1, unit="program", enabled=pipe.progress) as bar:
        made = {name: compiled(program) for name, program in programs.items()}
        compiled(the_loop(*family, batch, made["start"], made["prepare"]))

    # On a CPU the device's memory is the host's, where each parameter is, for a moment, also as it was read.
    on_host = mesh.devices.flat[0].platform == "cpu"
    stages = [(part, name) for part, name in STAGES if part in held]
    if memory.free_networks:
        loading = {part: _loading(sizes[part]) - held[part] if on_host else 0 for part in held}
        return [Stage(name, held[part], max(beside[part], loading[part])) for part, name in stages]
    total = sum(held.values())
    every = [size for part in pipe.networks for size in sizes[part]]
    first = [Stage("loading weights", total, max(0, _loading(every) - total))] if on_host else []
    run = []
    for part, name in stages:
        # Made at a network's first use, and kept.
        total += sum(map(_bytes, transformed.get(part, {}).values()))
        run.append(Stage(name, total, beside[part]))
    return [*first, *run]


def _loading(sizes: list[tuple[int, float]]) -> int:
    """The most that is held while parameters are read one after the other, each for a moment also as it was read.

    sizes: in bytes, what stays of each, and what it is as it was read.
    """
    held = itertools.accumulate(kept for kept, _ in sizes)
    return round(max(total + read for total, (_, read) in zip(held, sizes, strict=True)))


def _bytes(array: jax.ShapeDtypeStruct) -> int:
    """On one device."""
    assert array.sharding is not None
    return math.prod(array.sharding.shard_shape(array.shape)) * np.dtype(array.dtype).itemsize
