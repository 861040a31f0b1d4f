"""Dynamic thresholding of predicted images (Imagen, Saharia et al. 2022, arXiv:2205.11487, section 2.3)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.sampling.solvers.solver import Row


def threshold(x0: jax.Array, row: Row) -> jax.Array:
    """Clamps each image to +-s and divides it by s, a quantile of its magnitudes.

    Args:
        x0: (B, ...) float32.
        row: Scalars "threshold_ratio", the quantile (0..1), and "threshold_max". s is at least 1 and at most that.

    Returns:
        (B, ...) float32.
    """
    magnitudes = jnp.abs(x0).reshape(x0.shape[0], -1)
    bound = jnp.clip(jnp.quantile(magnitudes, row["threshold_ratio"], axis=1), 1, row["threshold_max"])
    bound = bound.reshape(-1, *(1,) * (x0.ndim - 1))
    return jnp.clip(x0, -bound, bound) / bound


def limits(settings: Mapping[str, Any]) -> dict[str, float]:
    """The columns by which `linear.step` limits x0, if the file asks for it.

    Raises:
        ValueError: A setting is out of range.
    """
    if settings["thresholding"]:
        return threshold_columns(settings)
    if not settings["clip_sample_range"] > 0:
        raise ValueError(f"scheduler config: clip_sample_range is {settings['clip_sample_range']!r}; want above 0")
    return {"clip": settings["clip_sample_range"] if settings["clip_sample"] else np.inf}


def threshold_columns(settings: Mapping[str, Any]) -> dict[str, float]:
    """The columns that `threshold` reads; none if thresholding is off.

    Raises:
        ValueError: A setting is out of range.
    """
    if not settings["thresholding"]:
        return {}
    ratio, maximum = settings["dynamic_thresholding_ratio"], settings["sample_max_value"]
    if not 0 <= ratio <= 1:
        raise ValueError(f"scheduler config: dynamic_thresholding_ratio is {ratio!r}; want 0 to 1")
    if not maximum > 0:
        raise ValueError(f"scheduler config: sample_max_value is {maximum!r}; want a positive number")
    return {"threshold_ratio": ratio, "threshold_max": maximum}
