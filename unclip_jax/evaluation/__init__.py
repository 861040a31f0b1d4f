"""Evaluation: distances of distributions, agreement with texts, and what a variation keeps of its source."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
