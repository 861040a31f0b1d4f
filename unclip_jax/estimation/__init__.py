"""From prompts, images, masks and depth maps to the arrays that networks read, and work with image embeddings."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
