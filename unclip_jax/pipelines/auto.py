"""Which pipeline a checkpoint is for."""

import os
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from jax.typing import DTypeLike

from unclip_jax.checkpoints.checkpoint import Checkpoint, task_of
from unclip_jax.checkpoints.local import local_path
from unclip_jax.checkpoints.places import OPEN_CLIP
from unclip_jax.pipelines.depth_to_image import DepthToImagePipeline
from unclip_jax.pipelines.estimate import DepthPipeline, NormalsPipeline
from unclip_jax.pipelines.inpaint import InpaintPipeline
from unclip_jax.pipelines.instruct import InstructPipeline
from unclip_jax.pipelines.memory import Memory
from unclip_jax.pipelines.opening import DEFAULT_MEMORY, check_overrides, open_source
from unclip_jax.pipelines.pipeline import Pipeline
from unclip_jax.pipelines.stable_unclip import StableUnCLIPPipeline
from unclip_jax.pipelines.text_to_image import TextToImagePipeline
from unclip_jax.pipelines.unclip import UnCLIPPipeline
from unclip_jax.pipelines.upscale import UpscalePipeline

_PIPELINES: dict[str, type[Pipeline]] = {
    "variations": UnCLIPPipeline,
    "text-to-image": TextToImagePipeline,
    "depth-to-image": DepthToImagePipeline,
    "inpaint": InpaintPipeline,
    "upscale": UpscalePipeline,
    "depth": DepthPipeline,
    "normals": NormalsPipeline,
    "instruct": InstructPipeline,
}


def pipeline_for(checkpoint: Checkpoint) -> type[Pipeline]:
    """The pipeline for what the checkpoint was trained for. Raises ValueError where that is not known."""
    return _PIPELINES[task_of(checkpoint)]


def from_pretrained(
    source: str | os.PathLike[str] | None = None,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    memory: Memory = DEFAULT_MEMORY,
    **overrides: Any,
) -> Pipeline:
    """Opens a checkpoint with the pipeline for what it was trained for.

    A diffusers folder with a prior among its parts is opened as `StableUnCLIPPipeline`.

    Args:
        source, dtype, mesh, memory, overrides: As for `Pipeline.from_pretrained`, whose errors are raised.
    """
    check_overrides(overrides)
    if source is not None and not str(source).startswith(OPEN_CLIP):
        where = {name: overrides.pop(name) for name in ("revision", "subfolder", "mirrors") if name in overrides}
        source = local_path(source, variant=overrides.get("variant"), **where)
        if _holds_prior(source):
            return StableUnCLIPPipeline.from_pretrained(source, dtype, mesh, memory, **overrides)

    def open_as(checkpoint: Checkpoint) -> Pipeline:
        return pipeline_for(checkpoint).from_checkpoint(checkpoint, dtype, mesh, memory)

    opened: Pipeline = open_source(open_as, source, memory, overrides)
    return opened


def _holds_prior(folder: Path) -> bool:
    return all((folder / part / "config.json").is_file() for part in ("prior", "unet"))
