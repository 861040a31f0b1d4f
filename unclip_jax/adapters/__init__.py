"""Adapters, which change a network's weights: low-rank adapters (LoRA) and textual inversion embeddings."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
