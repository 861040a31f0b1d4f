"""Whose procedure is followed where the two reference implementations differ."""

from enum import StrEnum


class Reference(StrEnum):
    """A property of a checkpoint, which says how its files are read, and of a solver, which says how a call is run.

    ORIGINAL: Stability-AI/stablediffusion (and OpenAI's and Karlo's code in its place). DIFFUSERS: diffusers and
    transformers.
    """

    ORIGINAL = "original"
    DIFFUSERS = "diffusers"
