"""Executables for a call: it is made without weights or arithmetic, every program that it reaches is compiled."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from jax.typing import DTypeLike
from PIL import Image

from unclip_jax import executables
from unclip_jax.checkpoints.checkpoint import Checkpoint, family_config
from unclip_jax.checkpoints.config import ESTIMATES
from unclip_jax.checkpoints.networks import Network
from unclip_jax.distributed import mesh as placement
from unclip_jax.pipelines.auto import pipeline_for
from unclip_jax.pipelines.compiled import Programs
from unclip_jax.pipelines.lowering import parameters, shaped
from unclip_jax.pipelines.memory import Memory
from unclip_jax.pipelines.opening import DEFAULT_MEMORY, executable_facts, fill_networks
from unclip_jax.pipelines.pipeline import Pipeline
from unclip_jax.pipelines.prepared import transformed_specs


def precompile(
    checkpoint: Checkpoint,
    call: Mapping[str, Any],
    root: Path | None = None,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    memory: Memory = DEFAULT_MEMORY,
    pipeline: type[Pipeline] | None = None,
) -> list[Path]:
    """Writes the executables of a call, and of every call that differs in values alone.

    Args:
        checkpoint: An open checkpoint of the family; its weights are not read.
        call: The arguments of the pipeline's call.
        root: The folder, see `unclip_jax.executables`. None: beside the weights of a converted checkpoint.
        dtype, mesh, memory: As for the checkpoint's pipeline.
        pipeline: The class; None: the one for what the checkpoint was trained for.

    Returns:
        The files, in the order of their use.

    Raises:
        ValueError: For arguments that the pipeline refuses.
        OSError: The folder cannot be written.
    """
    if root is None and not Path(checkpoint.source).is_dir():
        raise ValueError(f"{checkpoint.source} is no folder: name one for the executables")
    root = Path(checkpoint.source) / executables.FOLDER if root is None else root
    cls = pipeline_for(checkpoint) if pipeline is None else pipeline
    pipe = _without_weights(cls, checkpoint, dtype, mesh, memory)
    facts = executable_facts(pipe)
    _transform(pipe)
    pipe.check(**call)  # before there is a folder
    folder = executables.write_facts(root, facts)
    made: dict[str, tuple[Path, Any]] = {}

    def recorded(name: str, jitted: Any) -> Any:
        """Compiles and writes a program where it would be called; returns zeros."""

        def record(*arrays: Any, **static: Any) -> Any:
            file = executables.call_name(name, arrays, static)
            if file not in made:
                compiled = jitted.lower(*arrays, **static).compile()
                made[file] = executables.write(folder, file, compiled), compiled
            compiled = made[file][1]
            return jax.tree.map(_zeros, compiled.out_info, compiled.output_shardings)

        return record

    fields = [field.name for field in dataclasses.fields(Programs)]
    pipe.programs = Programs(**{name: recorded(name, getattr(pipe.programs, name)) for name in fields})
    pipe.progress = False
    with _compiled_anew():
        pipe(**call)
    return [path for path, _ in made.values()]


def example_call(checkpoint: Checkpoint, height: int | None, width: int | None, batch: int) -> dict[str, Any]:
    """The arguments of a call of what the checkpoint was trained for: `batch` images at once.

    height, width: In pixels; None: the checkpoint's own size. An upscaler's image is a quarter of them.
    """
    config = family_config(checkpoint)
    own = config.unet.sample_size * config.vae.factor
    height, width = own if height is None else height, own if width is None else width
    call: dict[str, Any] = {"prompt": "", "num_images_per_prompt": batch}
    size = {"height": height, "width": width}
    if config.task == "text-to-image":
        return {**call, **size}
    if config.task == "variations":
        return {**call, **size, "image": Image.new("RGB", (own, own))}
    if config.task in ESTIMATES:
        images = [Image.new("RGB", (width, height))] * batch
        return {"image": images, "processing_resolution": 0, "num_inference_steps": 1}
    if config.task == "upscale":
        return {**call, "image": Image.new("RGB", (width // config.vae.factor, height // config.vae.factor))}
    call["image"] = Image.new("RGB", (width, height))
    return {**call, "mask_image": Image.new("L", (width, height), 255)} if config.task == "inpaint" else call


def _without_weights(
    cls: type[Pipeline], checkpoint: Checkpoint, dtype: DTypeLike | None, mesh: Mesh | None, memory: Memory
) -> Pipeline:
    """A pipeline that has shapes in the place of the parameters that it would have."""
    # All that decides about the networks; transformed kernels, which do not go with free_networks, come later.
    abstract = dataclasses.replace(memory, convolution=None, free_networks=True)
    opened = fill_networks(checkpoint, cls.accepts, cls.__name__, cls.diffusers_class, dtype, mesh, abstract)
    specs = parameters(opened.config, opened.networks, opened.mesh)
    networks = {name: Network(network.graphdef, specs[name]) for name, network in opened.networks.items()}
    return cls(dataclasses.replace(opened, networks=networks, memory=memory, residency=None))


def _transform(pipe: Pipeline) -> None:
    """Puts transformed kernels where the pipeline's programs would be given such."""
    if pipe.kernels is not None:
        whole = placement.replicated(pipe.mesh)
        for name, kernels in transformed_specs(pipe.networks).items():
            made = {kernel: shaped(spec.shape, whole) for kernel, spec in kernels.items()}
            pipe.networks[name] = Network(pipe.networks[name].graphdef, {**pipe.networks[name].params, **made})
        pipe.kernels = None


def _zeros(out: Any, sharding: Any) -> jax.Array:
    return jax.device_put(np.zeros(out.shape, out.dtype), sharding)


@contextlib.contextmanager
def _compiled_anew() -> Iterator[None]:
    """Without JAX's cache, and what this process has read from it: on a CPU, such a program cannot be written again.

    So it is in jaxlib 0.10.1.
    """
    enabled = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]  # made at run time
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks once whether there is one
    jax.clear_caches()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()
