"""Defaults of arguments, which are known not to be the caller's, and the checkpoint's own in their place."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from unclip_jax.pipelines.arguments import CommonArguments

Arguments = TypeVar("Arguments", bound="CommonArguments")
FAINTEST = 1e-3  # of a strength: a run has at most 1000 steps


class DefaultInt(int):
    """A default: equal to its number, and known not to be the caller's."""


class DefaultFloat(float):
    """A default: equal to its number, and known not to be the caller's."""


def is_default(value: Any) -> bool:
    """Whether the value of an argument is a default, which the caller did not give."""
    return isinstance(value, DefaultInt | DefaultFloat)


def default(arguments: Any, name: str) -> Any:
    """The default of an argument."""
    return next(field.default for field in dataclasses.fields(arguments) if field.name == name)


def with_own_defaults(a: Arguments, distilled: bool) -> Arguments:
    """The arguments of a call, with the checkpoint's own defaults for those that the caller did not give.

    A distilled checkpoint makes one step without guidance; from an image, the fewest that leave one at the `strength`.

    Args:
        a: of the call.
        distilled: of the checkpoint's configuration.
    """
    changes: dict[str, Any] = {}
    if distilled and is_default(a.guidance_scale):
        changes["guidance_scale"] = DefaultFloat(1)
    if distilled and is_default(a.num_inference_steps):
        strength = getattr(a, "strength", 1)
        fits = isinstance(strength, int | float) and FAINTEST <= strength <= 1  # others are refused later
        changes["num_inference_steps"] = DefaultInt(math.ceil(1 / strength) if fits else 1)
    return dataclasses.replace(a, **changes)
