"""ControlNets within a run: what they need once, and what they add to the UNet's features at every step."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unclip_jax.checkpoints.networks import Network
from unclip_jax.sampling.guidance import Guidance
from unclip_jax.sampling.solvers import Row


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["network", "hint"], meta_fields=["column", "guesses", "graded"]
)
@dataclasses.dataclass(frozen=True)
class Control:
    """A ControlNet of a run.

    Attributes:
        network: with its parameters.
        hint: (B, h, w, features), from `embed_hint`.
        column: of the grid: its conditioning scale.
        guesses: whether it is run for the rows with conditions alone.
        graded: as for `unclip_jax.models.controlnet.scaled`.
    """

    network: Network
    hint: jax.Array
    column: str
    guesses: bool
    graded: bool


class ControlConstants(NamedTuple):
    """What stays the same over the loop, for the rows that the ControlNet is run for.

    Attributes:
        text: the keys and values of every cross-attention.
        classes: (rows, C), to be added to the embedding of the time; None without class conditioning.
        hint: (rows, h, w, features).
    """

    text: Any
    classes: jax.Array | None
    hint: jax.Array


def embed_hint(network: Network, hint: jax.Array) -> jax.Array:
    """Hints (B, H, W, 3) in 0..1 as a ControlNet reads them at every step: (B, h, w, features)."""
    embedded: jax.Array = network.merge().embed_hint(hint)
    return embedded


def control_constants(
    control: Control, states: jax.Array, labels: jax.Array | None, guidance: Guidance
) -> ControlConstants:
    """The constants of a run of B images. states, labels: of all guidance rows, (rows B, ...)."""
    model = control.network.merge()
    rows = guidance.rows - _left_out(control, guidance)
    classes = None
    if labels is not None and model.class_embedding is not None:
        classes = model.embed_class(_own_rows(control, guidance, labels))
    return ControlConstants(
        text=model.encode_context(_own_rows(control, guidance, states)),
        classes=classes,
        hint=jnp.repeat(control.hint, rows, axis=0),
    )


def control_residuals(
    controls: Sequence[Control], constants: Sequence[ControlConstants], x: jax.Array, row: Row, guidance: Guidance
) -> list[jax.Array] | None:
    """What all ControlNets add, for `UNet.denoise`; None where there are none. x: (rows B, h, w, 4), the latents."""
    from unclip_jax.models.controlnet import scaled  # with Flax: only where this is traced

    total: list[jax.Array] | None = None
    for control, (text, classes, hint) in zip(controls, constants, strict=True):
        model = control.network.merge()
        emb = model.embed_time(row["timestep"][None])
        emb = emb if classes is None else emb + classes
        made = model.residuals(_own_rows(control, guidance, x), emb, text, hint)
        scale = jnp.repeat(row[control.column], guidance.rows - _left_out(control, guidance))
        made = [_all_rows(control, guidance, residual) for residual in scaled(made, scale, control.graded)]
        total = made if total is None else [a + b for a, b in zip(total, made, strict=True)]
    return total


def _left_out(control: Control, guidance: Guidance) -> int:
    """How many of an image's first rows a ControlNet is not run for: those without the prompt, or none."""
    return control.guesses * guidance.before


def _own_rows(control: Control, guidance: Guidance, array: jax.Array) -> jax.Array:
    """(rows B, ...) -> those of the rows that the ControlNet is run for."""
    of_images = array.reshape(-1, guidance.rows, *array.shape[1:])[:, _left_out(control, guidance) :]
    return of_images.reshape(-1, *array.shape[1:])


def _all_rows(control: Control, guidance: Guidance, array: jax.Array) -> jax.Array:
    """The inverse of `_own_rows`, with zeros in the other rows."""
    left_out = _left_out(control, guidance)
    if not left_out:
        return array
    of_images = array.reshape(-1, guidance.rows - left_out, *array.shape[1:])
    padding = [(0, 0), (left_out, 0), *[(0, 0)] * (array.ndim - 1)]
    return jnp.pad(of_images, padding).reshape(-1, *array.shape[1:])
