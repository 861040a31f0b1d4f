"""Checkpoints: opened from wherever they are, read parameter by parameter, filled into networks."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
