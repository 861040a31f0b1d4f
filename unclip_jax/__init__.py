"""Stable Diffusion 2.1 unCLIP in pure JAX: image variations, numerically equal to the PyTorch original."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["UnCLIPOutput", "UnCLIPPipeline", "__version__"]

if TYPE_CHECKING:
    from unclip_jax.pipelines.unclip import UnCLIPOutput, UnCLIPPipeline


def __getattr__(name: str) -> Any:
    # Imported when first used: the command line answers --help and refuses bad usage without waiting for JAX.
    if name in ("UnCLIPOutput", "UnCLIPPipeline"):
        from unclip_jax.pipelines import unclip

        return getattr(unclip, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
