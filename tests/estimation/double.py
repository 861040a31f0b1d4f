"""PyTorch with float64 under the name of float32, for references that ask for the latter by name."""

import torch


class Double:
    """Takes the place of `torch` in a module."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)
