"""Stable Diffusion 2.1 unCLIP and its family in pure JAX, numerically equal to the PyTorch original."""

import lazy_loader

__version__ = "0.1.0"

# What `__init__.pyi` names is imported when it is first used, so that the command line answers --help and refuses bad
# usage without waiting for JAX.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
