"""Merging checkpoints: adding what a fine-tune has learnt to another model of the same base."""

import functools
import math
import os

import numpy as np

from convert.statistics import STATISTICS
from unclip_jax.checkpoints.checkpoint import Checkpoint, Parameter
from unclip_jax.checkpoints.nonfinite import cast, warn_unless_finite
from unclip_jax.checkpoints.source import open_checkpoint

# A UNet's first convolution reads the latents first, whatever it reads beside them: a mask, a depth map.
FIRST = "unet.conv_in.kernel"
INPUTS = 2  # its axis of channels that are read


def add_difference(
    a: Checkpoint, b: Checkpoint, c: Checkpoint, scale: float = 1.0, dtype: np.dtype | None = None
) -> Checkpoint:
    """The checkpoint A + scale (B - C): A with what B has learnt since C.

    Everything except the weights is A's. So are parameters that B and C do not both have, and the statistics of an
    unCLIP's embeddings, which belong to its image encoder. If A's UNet reads more channels than theirs, as one for
    inpainting does, the difference is added to the channels of the latents, which come first.

    Sums are float32; a number to which nothing is added keeps its bits. Numbers that become infinite in the result's
    dtype cause a warning that names the parameter. One parameter is in memory at a time, or one layer of stacked
    layers. Source: AUTOMATIC1111's checkpoint merger, "Add difference".

    Args:
        a: A. Reading is lazy, so all three must stay open.
        b: B.
        c: C.
        scale: The scale.
        dtype: Of the result; by default each parameter's own in A.

    Returns:
        The merged checkpoint.

    Raises:
        ValueError: The scale is not a finite number, shapes differ (the message gives all three), or the three have no
            parameter in common.
    """
    require_scale(scale)
    names = shared(a, b, c)
    if not names:
        raise ValueError(f"{a.source}, {b.source} and {c.source} have no parameter in common: nothing to add")
    params = dict(a.params)
    for name in names:
        of_a, of_b, of_c = (checkpoint.params[name] for checkpoint in (a, b, c))
        if of_b.shape != of_c.shape or not _fits(name, of_b.shape, of_a.shape):
            raise ValueError(
                f"{name} has shape {of_a.shape} in A, {of_b.shape} in B, {of_c.shape} in C; want one shape"
            )
        params[name] = _sum(name, of_a, of_b, of_c, scale, of_a.dtype if dtype is None else dtype)
    source = f"{a.source} + {scale:g} ({b.source} - {c.source})"
    return Checkpoint(a.config, a.tokenizer, params, source, (*a.files, *b.files, *c.files))


def open_weights(source: str | os.PathLike[str], config: str | os.PathLike[str] | None = None) -> Checkpoint:
    """Opens a checkpoint only for its weights: what its UNet predicts does not matter, and is not guessed.

    Takes the arguments of `unclip_jax.checkpoints.source.open_checkpoint` and raises its errors.
    """
    return open_checkpoint(source, config=config, prediction_type="epsilon")


def shared(a: Checkpoint, b: Checkpoint, c: Checkpoint) -> list[str]:
    """The parameters that a difference is added to: those that all three have, in A's order."""
    return [name for name in a.params if name in b.params and name in c.params and name not in STATISTICS]


def require_scale(scale: float) -> None:
    """Checks that float32 can hold the number.

    Raises:
        ValueError: It cannot.
    """
    if not (math.isfinite(scale) and abs(scale) <= float(np.finfo(np.float32).max)):
        raise ValueError(f"scale is {scale}; want a finite number of float32")


def _fits(name: str, difference: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    if name == FIRST and len(difference) == len(shape):
        channels = min(difference[INPUTS], shape[INPUTS])
        shape = (*shape[:INPUTS], channels, *shape[INPUTS + 1 :])
    return difference == shape


def _sum(name: str, a: Parameter, b: Parameter, c: Parameter, scale: float, dtype: np.dtype) -> Parameter:
    def piece(index: int) -> np.ndarray:
        def read(parameter: Parameter) -> np.ndarray:
            return parameter.read() if len(a.pieces) == 1 else parameter.read_layer(index)[None]

        difference = _scaled(read(b), read(c), scale)  # the two are let go before A's is read
        return _add(name, a.pieces[index](), difference, dtype)

    return Parameter(a.shape, dtype, tuple(functools.partial(piece, index) for index in range(len(a.pieces))))


def _scaled(b: np.ndarray, c: np.ndarray, scale: float) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):  # `_add` warns of it, by name
        difference = np.subtract(b, c, dtype=np.float32)
        difference *= np.float32(scale)
    return difference


def _add(name: str, a: np.ndarray, difference: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A with the difference added as far as that reaches; the rest of A is kept."""
    if difference.shape != a.shape:
        missing = (whole - part for whole, part in zip(a.shape, difference.shape, strict=True))
        difference = np.pad(difference, [(0, count) for count in missing])
    kept = difference == 0  # 0 added to -0 would be 0
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.add(a, difference, out=difference, dtype=np.float32)
    out = cast(name, warn_unless_finite(name, total), dtype)
    np.copyto(out, cast(name, a, dtype), where=kept)
    return out
