"""The programs of a run with the shapes that it gives them, to be compiled before there are weights or inputs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from unclip_jax.checkpoints.config import AnyConfig, CheckpointConfig
from unclip_jax.checkpoints.networks import Network
from unclip_jax.checkpoints.placement import parameter_shardings
from unclip_jax.distributed import mesh as placement
from unclip_jax.pipelines.compiled import Programs
from unclip_jax.pipelines.control import Control
from unclip_jax.pipelines.run import GRID_ROWS
from unclip_jax.sampling.guidance import Guidance
from unclip_jax.sampling.solvers import Solver, make_solver
from unclip_jax.sampling.solvers.solver import without_grid

# Parameters as shapes on their devices: part -> name -> shape.
Weights = Mapping[str, Mapping[str, jax.ShapeDtypeStruct]]
# Of a call without ControlNets, as `unclip_jax.pipelines.run` gives them.
NO_CONTROLS: list[Control] = []


class Lowerable(NamedTuple):
    """A program of a run: `lower().compile()` compiles it.

    Attributes:
        part: the network that it runs; for `start` the one that it is run beside.
        program: one of `Programs`.
        weights: the network's parameters, as shapes; None where the program runs none.
        given: its other arguments, with shapes in the place of arrays.
        static: by name.
    """

    part: str
    program: Any
    weights: Any
    given: tuple[Any, ...]
    static: Mapping[str, Any] = {}

    @property
    def arrays(self) -> list[jax.ShapeDtypeStruct]:
        """What is given of arrays."""
        return [leaf for leaf in jax.tree.leaves(self.given) if isinstance(leaf, jax.ShapeDtypeStruct)]

    def lower(self) -> Any:
        weights = () if self.weights is None else (self.weights,)
        return self.program.lower(*weights, *self.given, **self.static)


def parameters(
    config: AnyConfig, networks: Mapping[str, Network], mesh: Mesh
) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """The parameters of a checkpoint's networks as shapes where a pipeline puts them: part -> name -> shape."""

    def placed(part: str, network: Network) -> dict[str, jax.ShapeDtypeStruct]:
        shardings = parameter_shardings(mesh, config, part, network)
        return {name: shaped(spec.shape, shardings[name], spec.dtype) for name, spec in network.params.items()}

    return {part: placed(part, network) for part, network in networks.items()}


def around_the_loop(
    config: CheckpointConfig,
    programs: Programs,
    mesh: Mesh,
    weights: Weights,
    latent_shape: tuple[int, int, int],
    batch: int,
) -> dict[str, Lowerable]:
    """The programs of networks before and after the loop of `batch` images, in the order of a run.

    Args:
        config: The checkpoint's.
        programs: From `unclip_jax.pipelines.compiled.make_programs`.
        mesh: The devices.
        weights: From `parameters`.
        latent_shape: (h, w, 4).
        batch: Images at once.

    Returns:
        The name of the program -> the program; those that the checkpoint has the network for.
    """
    many, group = placement.batch_sharding(mesh), placement.data_size(mesh)
    rows = _rows(mesh, batch)
    factor, text = config.vae.factor, config.text_encoder
    made: dict[str, Lowerable] = {}

    def reads(name: str, part: str, program: Any, array: jax.ShapeDtypeStruct) -> None:
        made[name] = Lowerable(part, program, weights[part], (array,))

    for part, program in (("image_encoder", programs.embed_images), ("depth_estimator", programs.estimate_depth)):
        if (network := getattr(config, part)) is not None:
            reads(part, part, program, shaped((group, network.image_size, network.image_size, 3), many))
    image = (group, factor * latent_shape[0], factor * latent_shape[1], 3)
    reads("vae_encode", "vae", programs.vae_encode, shaped(image, many))
    reads("text_encoder", "text_encoder", programs.embed_text, shaped((group, text.context_length), many, np.int32))

    states = shaped((rows, text.context_length, text.width), many)
    extra = config.unet.in_channels - latent_shape[-1]
    channels = shaped((rows, *latent_shape[:2], extra), many) if extra else None
    guidance = _guidance(config)
    negative = states if guidance.unconditional else None
    given = (states, negative, _labels(config, rows, many), channels, None, None, NO_CONTROLS)
    made["prepare"] = Lowerable("unet", programs.prepare, weights["unet"], given, {"guidance": guidance})
    begins = (without_grid(_solver(config)), shaped((rows, *latent_shape), many), None)
    made["start"] = Lowerable("unet", programs.start, None, begins, {"guidance": guidance})
    reads("decode", "vae", programs.decode, shaped((group, *latent_shape), many))
    return made


def the_loop(
    config: CheckpointConfig, programs: Programs, mesh: Mesh, weights: Weights, batch: int, start: Any, prepare: Any
) -> Lowerable:
    """The loop itself. start, prepare: those of `around_the_loop`, compiled; the others: as there."""
    one, many = placement.replicated(mesh), placement.batch_sharding(mesh)
    rows = _rows(mesh, batch)
    solver, guidance = _solver(config), _guidance(config)
    columns = {name: shaped((GRID_ROWS,), one, column.dtype) for name, column in solver.grid.items()}
    for name in guidance.strengths:
        columns[name] = shaped((GRID_ROWS, rows), NamedSharding(mesh, PartitionSpec(None, *many.spec)))
    given = (
        without_grid(solver),
        _outputs(start),
        columns,
        _outputs(prepare),
        shaped((rows,), many, np.uint32),
        shaped((rows,), many, np.int32),
        (shaped((), one, np.int32),) * 2,
        NO_CONTROLS,
    )
    return Lowerable("unet", programs.run_steps, weights["unet"], given, {"guidance": guidance})


def shaped(shape: tuple[int, ...], sharding: Any, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
    """An array as its shape on its devices."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _rows(mesh: Mesh, batch: int) -> int:
    group = placement.data_size(mesh)
    return -(-batch // group) * group


def _solver(config: CheckpointConfig) -> Solver:
    return make_solver(config.scheduler, config.scheduler_config, 20)


def _guidance(config: CheckpointConfig) -> Guidance:
    """What guides a call that says nothing about it."""
    return Guidance(unconditional=config.estimator is None, image=config.task == "instruct")


def _labels(config: CheckpointConfig, rows: int, sharding: Any) -> jax.ShapeDtypeStruct | None:
    if config.unet.class_embedding == "projection":
        assert config.unet.class_embedding_size is not None
        return shaped((rows, config.unet.class_embedding_size), sharding)
    return None if config.unet.class_embedding is None else shaped((rows,), sharding, np.int32)


def _outputs(compiled: Any) -> Any:
    """What a compiled program will return, as shapes on their devices."""
    return jax.tree.map(
        lambda out, sharding: shaped(out.shape, sharding, out.dtype), compiled.out_info, compiled.output_shardings
    )
