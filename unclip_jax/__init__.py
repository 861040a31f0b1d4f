"""Stable Diffusion 2.1 unCLIP and its family in pure JAX, numerically equal to the PyTorch original."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name is: imported when first used, so that the command line answers --help and refuses bad usage
# without waiting for JAX.
_MODULES = {
    "DepthToImagePipeline": "pipelines.depth_to_image",
    "ImageToImagePipeline": "pipelines.image_to_image",
    "InpaintPipeline": "pipelines.inpaint",
    "Memory": "pipelines.memory",
    "PipelineOutput": "pipelines.pipeline",
    "ProjectedGuidance": "pipelines.arguments",
    "StableUnCLIPPipeline": "pipelines.stable_unclip",
    "TextToEmbeddingPrior": "pipelines.prior",
    "TextToImagePipeline": "pipelines.text_to_image",
    "UnCLIPPipeline": "pipelines.unclip",
    "UpscalePipeline": "pipelines.upscale",
    "from_pretrained": "pipelines.auto",
}
__all__ = [
    "DepthToImagePipeline",
    "ImageToImagePipeline",
    "InpaintPipeline",
    "Memory",
    "PipelineOutput",
    "ProjectedGuidance",
    "StableUnCLIPPipeline",
    "TextToEmbeddingPrior",
    "TextToImagePipeline",
    "UnCLIPPipeline",
    "UpscalePipeline",
    "__version__",
    "from_pretrained",
]

if TYPE_CHECKING:
    from unclip_jax.pipelines.arguments import ProjectedGuidance
    from unclip_jax.pipelines.auto import from_pretrained
    from unclip_jax.pipelines.depth_to_image import DepthToImagePipeline
    from unclip_jax.pipelines.image_to_image import ImageToImagePipeline
    from unclip_jax.pipelines.inpaint import InpaintPipeline
    from unclip_jax.pipelines.memory import Memory
    from unclip_jax.pipelines.pipeline import PipelineOutput
    from unclip_jax.pipelines.prior import TextToEmbeddingPrior
    from unclip_jax.pipelines.stable_unclip import StableUnCLIPPipeline
    from unclip_jax.pipelines.text_to_image import TextToImagePipeline
    from unclip_jax.pipelines.unclip import UnCLIPPipeline
    from unclip_jax.pipelines.upscale import UpscalePipeline


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"unclip_jax.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
