"""Pipelines: from checked arguments to images, as a chain of values. docs/architecture.md has the flow."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
