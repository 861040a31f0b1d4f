"""Opening a checkpoint for a pipeline: its networks on the devices, and the tables that go with them."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from unclip_jax import executables
from unclip_jax.checkpoints.checkpoint import Checkpoint, family_config, task_of
from unclip_jax.checkpoints.config import AnyConfig, CheckpointConfig, for_task
from unclip_jax.checkpoints.loading import load_networks
from unclip_jax.checkpoints.networks import Network, abstract_networks
from unclip_jax.checkpoints.placement import shard_weights
from unclip_jax.checkpoints.repairs import repaired
from unclip_jax.checkpoints.source import open_checkpoint
from unclip_jax.compilation import use_compilation_cache
from unclip_jax.conditioning.tokenizer import Tokenizer
from unclip_jax.distributed import mesh as placement
from unclip_jax.models.platform import platform_of
from unclip_jax.pipelines.compiled import compiled_ahead
from unclip_jax.pipelines.memory import Memory
from unclip_jax.pipelines.parts import Residency
from unclip_jax.sampling.schedule import alphas_cumprod

DEFAULT_MEMORY: Memory = Memory()
DTYPES: dict[str, Any] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
OVERRIDES = (
    *("config", "prediction_type", "clip_stats", "vae", "unet", "preprocess", "ema"),
    *("variant", "revision", "subfolder", "mirrors", "executables"),
)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint of the family on its devices.

    Attributes:
        sources: what it was opened from, see `Checkpoint.sources`.
        networks: name -> `Network`; of `Memory(free_networks=True)` with shapes in the place of parameters.
        noising: the tables by which unCLIP's image embeddings, or an upscaler's small image, are noised.
        dtype: of weights and computation.
        residency: of `Memory(free_networks=True)`.
    """

    config: CheckpointConfig
    tokenizer: Tokenizer
    networks: dict[str, Network]
    noising: Mapping[str, jax.Array]
    mesh: Mesh
    dtype: Any
    memory: Memory = DEFAULT_MEMORY
    residency: Residency | None = None
    sources: tuple[str, ...] = ("a pipeline's networks",)


def open_source(
    open_as: Callable[[Checkpoint], Any],
    source: str | os.PathLike[str] | None,
    memory: Memory,
    overrides: Mapping[str, Any],
) -> Any:
    """Opens a checkpoint for `open_as`, and keeps it open where the networks are to be read later.

    Its programs are read from the folder `executables` of the overrides; without one from beside the checkpoint.

    Raises ValueError for an unknown override.
    """
    check_overrides(overrides)
    use_compilation_cache()
    named = overrides.get("executables")
    with contextlib.ExitStack() as stack:
        options = {name: value for name, value in overrides.items() if name != "executables"}
        checkpoint = stack.enter_context(open_checkpoint(source, **options))
        pipe = open_as(checkpoint)
        root = Path(checkpoint.source) / executables.FOLDER if named is None else Path(named)
        if named is not None or root.is_dir():
            found = executables.find(root, executable_facts(pipe), pipe.mesh, named is not None)
            pipe.programs = compiled_ahead(pipe.programs, found)
        if memory.free_networks:
            stack.pop_all()
        return pipe


def fill_networks(
    checkpoint: Checkpoint,
    accepts: tuple[str, ...],
    pipeline: str,
    diffusers_class: str,
    dtype: DTypeLike | None,
    mesh: Mesh | None,
    memory: Memory,
) -> Opened:
    """The networks of an open checkpoint, parameter by parameter, straight onto their devices.

    Args:
        accepts: the tasks of checkpoints that the pipeline takes; pipeline: its name, for a refusal.
        diffusers_class: the same pipeline there, whose corrections of a folder's files are made here, too.

    Raises:
        ValueError: for a checkpoint of another task, or of an unknown one.
    """
    mesh = placement.local_mesh() if mesh is None else placement.check_mesh(mesh)
    dtype = check_dtype(dtype, mesh)
    config = for_task(family_config(checkpoint), accepts)
    if (task := task_of(dataclasses.replace(checkpoint, config=config))) not in accepts:
        raise ValueError(
            f"{checkpoint.source} is a checkpoint for {task}; {pipeline} takes one for {' or '.join(accepts)}"
        )
    config = repaired(config, diffusers_class, checkpoint.source)
    networks = open_networks(checkpoint, config, dtype, mesh, memory)
    tables: dict[str, Any] = {}
    if config.image_noising is not None:
        tables["alphas_cumprod"] = alphas_cumprod(config.image_noising, config.reference)
    if config.image_noising is not None and config.image_embedding_dim is not None:
        for name in ("mean", "std"):
            tables[name] = np.asarray(checkpoint.params[f"image_normalizer.{name}"].read(), np.float32)
    return Opened(
        config=config,
        tokenizer=checkpoint.tokenizer,
        networks=networks,
        noising=placement.placed(tables, placement.replicated(mesh)),
        mesh=mesh,
        dtype=dtype,
        memory=memory,
        residency=Residency(checkpoint) if memory.free_networks else None,
        sources=checkpoint.sources,
    )


def fill_network(
    checkpoint: Checkpoint, name: str, dtype: DTypeLike | None, mesh: Mesh | None
) -> tuple[Network, Mesh, Any]:
    """The network of a checkpoint that has no other, on its devices; these, and the dtype. None: as for a pipeline.

    Raises ValueError.
    """
    mesh = placement.local_mesh() if mesh is None else placement.check_mesh(mesh)
    dtype = check_dtype(dtype, mesh)
    return load_networks(checkpoint, abstract_networks(checkpoint.config, dtype), mesh)[name], mesh, dtype


def open_networks(
    checkpoint: Checkpoint, config: AnyConfig, dtype: Any, mesh: Mesh, memory: Memory
) -> dict[str, Network]:
    """The networks of an open checkpoint, as `memory` wants them: filled, or with shapes; whole, or split."""
    networks = abstract_networks(config, dtype, memory.attention_chunk)
    if memory.shard_weights:
        networks = shard_weights(networks, config, mesh)
    return networks if memory.free_networks else load_networks(checkpoint, networks, mesh)


def executable_facts(pipe: Any) -> executables.Facts:
    """What has to be equal for the programs of two pipelines, as they are opened, to be the same."""
    shapes = {
        f"{part}.{name}": (spec.shape, str(spec.dtype))
        for part, network in pipe.networks.items()
        for name, spec in network.params.items()
    }
    memory = {name: getattr(pipe.memory, name) for name in ("decoding", "tile", "attention_chunk")}
    dtype = jnp.dtype(pipe.dtype).name
    return executables.make_facts(pipe.mesh, dtype=dtype, config=pipe.config, weights=shapes, memory=str(memory))


def check_overrides(overrides: Mapping[str, Any]) -> None:
    """Raises ValueError for what `from_pretrained` does not take."""
    if unknown := overrides.keys() - set(OVERRIDES):
        raise ValueError(f"unknown overrides {', '.join(sorted(unknown))}; accepted: {', '.join(OVERRIDES)}")


def check_dtype(dtype: DTypeLike | None, mesh: Mesh) -> Any:
    """The dtype of weights and computation.

    None is float32 on a CPU, float16 on NVIDIA GPUs that have no bfloat16, and bfloat16 elsewhere. Raises ValueError.
    """
    if dtype is None:
        defaults = {"cpu": jnp.float32, "old-gpu": jnp.float16}
        return defaults.get(platform_of(mesh.devices.flat[0]), jnp.bfloat16)
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; accepted: {', '.join(DTYPES)}")
    return DTYPES[name]
