"""The reference implementation that is followed where the two differ."""

from enum import StrEnum


class Reference(StrEnum):
    """A property of a checkpoint (how its files are read) and of a solver (how a call is run).

    ORIGINAL is Stability-AI/stablediffusion (and OpenAI's and Karlo's code in its place). DIFFUSERS is diffusers and
    transformers.
    """

    ORIGINAL = "original"
    DIFFUSERS = "diffusers"
