"""Stable Diffusion 2.1 unCLIP in pure JAX: image variations, numerically equal to the PyTorch original."""

__version__ = "0.1.0"

from unclip_jax.pipelines.unclip import UnCLIPOutput, UnCLIPPipeline

__all__ = ["UnCLIPOutput", "UnCLIPPipeline", "__version__"]
