"""Stable Diffusion 2.1 unCLIP in pure JAX."""

__version__ = "0.1.0"
