"""Stable Diffusion 2.1 unCLIP and its family in pure JAX, numerically equal to the PyTorch original."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name is: imported when first used, so that the command line answers --help and refuses bad usage
# without waiting for JAX.
_MODULES = {
    "DepthToImagePipeline": "pipelines.depth_to_image",
    "FreeU": "models.freeu",
    "ImageToImagePipeline": "pipelines.image_to_image",
    "InpaintPipeline": "pipelines.inpaint",
    "MARK": "watermark",
    "Memory": "pipelines.memory",
    "Network": "checkpoints.networks",
    "Pipeline": "pipelines.pipeline",
    "PipelineOutput": "pipelines.output",
    "ProjectedGuidance": "pipelines.checks",
    "Reference": "reference",
    "Solver": "sampling.solvers.solver",
    "StableUnCLIPPipeline": "pipelines.stable_unclip",
    "StreamState": "pipelines.output",
    "TextToEmbeddingPrior": "pipelines.prior",
    "TextToImagePipeline": "pipelines.text_to_image",
    "UnCLIPPipeline": "pipelines.unclip",
    "UpscalePipeline": "pipelines.upscale",
    "from_pretrained": "pipelines.auto",
    "local_mesh": "distributed.mesh",
    "open_checkpoint": "checkpoints.source",
    "plan": "pipelines.plan",
}
_PACKAGES = (
    "adapters",
    "checkpoints",
    "conditioning",
    "distributed",
    "evaluation",
    "models",
    "pipelines",
    "sampling",
    "training",
)
__all__ = [
    "MARK",
    "DepthToImagePipeline",
    "FreeU",
    "ImageToImagePipeline",
    "InpaintPipeline",
    "Memory",
    "Network",
    "Pipeline",
    "PipelineOutput",
    "ProjectedGuidance",
    "Reference",
    "Solver",
    "StableUnCLIPPipeline",
    "StreamState",
    "TextToEmbeddingPrior",
    "TextToImagePipeline",
    "UnCLIPPipeline",
    "UpscalePipeline",
    "__version__",
    "from_pretrained",
    "local_mesh",
    "open_checkpoint",
    "plan",
]

if TYPE_CHECKING:
    from unclip_jax.checkpoints.networks import Network
    from unclip_jax.checkpoints.source import open_checkpoint
    from unclip_jax.distributed.mesh import local_mesh
    from unclip_jax.models.freeu import FreeU
    from unclip_jax.pipelines.auto import from_pretrained
    from unclip_jax.pipelines.checks import ProjectedGuidance
    from unclip_jax.pipelines.depth_to_image import DepthToImagePipeline
    from unclip_jax.pipelines.image_to_image import ImageToImagePipeline
    from unclip_jax.pipelines.inpaint import InpaintPipeline
    from unclip_jax.pipelines.memory import Memory
    from unclip_jax.pipelines.output import PipelineOutput, StreamState
    from unclip_jax.pipelines.pipeline import Pipeline
    from unclip_jax.pipelines.plan import plan
    from unclip_jax.pipelines.prior import TextToEmbeddingPrior
    from unclip_jax.pipelines.stable_unclip import StableUnCLIPPipeline
    from unclip_jax.pipelines.text_to_image import TextToImagePipeline
    from unclip_jax.pipelines.unclip import UnCLIPPipeline
    from unclip_jax.pipelines.upscale import UpscalePipeline
    from unclip_jax.reference import Reference
    from unclip_jax.sampling.solvers.solver import Solver
    from unclip_jax.watermark import MARK


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"unclip_jax.{_MODULES[name]}"), name)
    if name in _PACKAGES:
        return importlib.import_module(f"unclip_jax.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_PACKAGES])
