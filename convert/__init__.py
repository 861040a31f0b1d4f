"""Every foreign file and name: PyTorch's checkpoints, adapters and tokenizers, read without PyTorch, and written."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
