"""What a run will need of a device's memory, known from the compiled programs before anything runs."""

import dataclasses
import itertools
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from unclip_jax.checkpoints.checkpoint import Checkpoint, family_config
from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.checkpoints.networks import head_width
from unclip_jax.distributed import mesh as placement
from unclip_jax.pipelines.auto import pipeline_for
from unclip_jax.pipelines.checks import MAX_IMAGES, check_integer, check_latent_shape
from unclip_jax.pipelines.memory import Memory
from unclip_jax.pipelines.opening import DEFAULT_MEMORY
from unclip_jax.pipelines.pipeline import Pipeline
from unclip_jax.pipelines.prepared import may_transform, transformed_specs
from unclip_jax.pipelines.run import GRID_ROWS
from unclip_jax.progress import Progress
from unclip_jax.sampling.guidance import Guidance
from unclip_jax.sampling.solvers import make_solver
from unclip_jax.sampling.solvers.solver import without_grid

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
    config = family_config(checkpoint)
    pipe = pipeline_for(config).from_checkpoint(checkpoint, dtype, mesh, abstract)
    latent_shape = check_latent_shape(pipe.config, height, width)
    batch = check_integer("batch", batch, 1, MAX_IMAGES)
    return _stages(pipe, latent_shape, batch, memory)


def _stages(pipe: Pipeline, latent_shape: tuple[int, int, int], batch: int, memory: Memory) -> list[Stage]:
    config, mesh, programs = pipe.config, pipe.mesh, pipe.programs
    one, many = placement.replicated(mesh), placement.batch_sharding(mesh)
    group = placement.data_size(mesh)
    rows = -(-batch // group) * group
    factor, text = config.vae.factor, config.text_encoder
    image = (1, factor * latent_shape[0], factor * latent_shape[1], 3)
    weights = {
        part: {
            name: _array(
                spec.shape,
                placement.parameter_sharding(mesh, f"{part}.{name}", spec.shape, head_width(config, part)),
                spec.dtype,
            )
            for name, spec in network.params.items()
        }
        for part, network in pipe.networks.items()
    }
    held = {part: sum(map(_bytes, arrays.values())) for part, arrays in weights.items()}
    sizes = {part: [_bytes(array) for array in arrays.values()] for part, arrays in weights.items()}
    transformed: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
    if may_transform(mesh, pipe.dtype, memory):
        for part, specs in transformed_specs(pipe.networks).items():
            transformed[part] = {name: _array(spec.shape, one) for name, spec in specs.items()}
            weights[part] |= transformed[part]
    beside: dict[str, int] = {}

    def count(part: str, lowered: Any, given: Any) -> Any:
        """Compiles a program of a stage; what it holds beside the weights is what it is given, makes, and works in."""
        made = lowered.compile()
        sizes = made.memory_analysis()
        made_and_worked_in = sizes.output_size_in_bytes - sizes.alias_size_in_bytes + sizes.temp_size_in_bytes
        beside[part] = max(beside.get(part, 0), made_and_worked_in + sum(map(_bytes, jax.tree.leaves(given))))
        bar.update()
        return made

    # The networks that read a given image, and its size.
    readers: dict[str, tuple[str, Any, tuple[int, ...]]] = {}
    if config.image_encoder is not None:
        side = config.image_encoder.image_size
        readers["encoding images"] = ("image_encoder", programs.embed_images, (1, side, side, 3))
    if config.depth_estimator is not None:
        side = config.depth_estimator.image_size
        readers["estimating depth"] = ("depth_estimator", programs.estimate_depth, (1, side, side, 3))
    if config.task in ("depth-to-image", "inpaint"):
        readers["encoding"] = ("vae", programs.vae_encode, image)

    with Progress("compiling the programs", 5 + len(readers), unit="program", enabled=pipe.progress) as bar:
        for part, program, shape in readers.values():
            count(part, program.lower(weights[part], _array(shape, one)), _array(shape, one))
        tokens = _array((1, text.context_length), one, np.int32)
        count("text_encoder", programs.embed_text.lower(weights["text_encoder"], tokens), tokens)

        solver = make_solver(config.scheduler, config.scheduler_config, 20)
        columns = {name: _array((GRID_ROWS,), one, column.dtype) for name, column in solver.grid.items()}
        columns["guidance_scale"] = _array((GRID_ROWS, rows), NamedSharding(mesh, PartitionSpec(None, *many.spec)))
        states = _array((rows, text.context_length, text.width), many)
        extra = config.unet.in_channels - latent_shape[-1]
        channels = _array((rows, *latent_shape[:2], extra), many) if extra else None
        given = (states, states, _labels(config, rows, many), channels, None, None)
        prepare = count("unet", programs.prepare.lower(weights["unet"], *given, guidance=Guidance()), given)
        noise = _array((rows, *latent_shape), many)
        solver = without_grid(solver)
        start = count("unet", programs.start.lower(solver, noise, None, guidance=Guidance()), ())
        step = (
            _outputs(start),
            columns,
            _outputs(prepare),
            _array((), one, np.uint32),
            _array((rows,), many, np.int32),
            (_array((), one, np.int32),) * 2,
        )
        count("unet", programs.run_steps.lower(weights["unet"], solver, *step, guidance=Guidance()), step)

        latents = _array((group, *latent_shape), many)
        count("vae", programs.decode.lower(weights["vae"], latents), latents)

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


def _labels(config: CheckpointConfig, rows: int, sharding: Any) -> jax.ShapeDtypeStruct | None:
    if config.image_embedding_dim is not None:
        return _array((rows, 2 * config.image_embedding_dim), sharding)
    return None if config.unet.class_embedding is None else _array((rows,), sharding, np.int32)


def _loading(sizes: list[int]) -> int:
    """The most that is held while parameters of these sizes are read one after the other, each twice for a moment."""
    return max(held + size for held, size in zip(itertools.accumulate(sizes), sizes, strict=True))


def _array(shape: tuple[int, ...], sharding: Any, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _outputs(compiled: Any) -> Any:
    """What a compiled program will return, as shapes on their devices."""
    return jax.tree.map(
        lambda out, sharding: _array(out.shape, sharding, out.dtype), compiled.out_info, compiled.output_shardings
    )


def _bytes(array: jax.ShapeDtypeStruct) -> int:
    """On one device."""
    assert array.sharding is not None
    return math.prod(array.sharding.shard_shape(array.shape)) * np.dtype(array.dtype).itemsize
