"""The networks, as Flax modules: they know no diffusion and no files."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
