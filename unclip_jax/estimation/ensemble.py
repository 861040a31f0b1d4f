"""Several predictions of one image's depth or normals made into one, and how far they differ.

Source: Marigold, Ke et al. 2024, arXiv:2312.02145, section 3.4; diffusers' pipelines of it.
"""

from typing import Literal

import numpy as np
import scipy.optimize
from numpy.typing import NDArray

from unclip_jax.conditioning.resample import longest_side, resample

DepthReduction = Literal["mean", "median"]
NormalsReduction = Literal["closest", "mean"]
LEAST = 1e-6  # what a range or a length is at least, where it divides


def ensemble_depth(
    depths: NDArray[np.float32],
    scale_invariant: bool = True,
    shift_invariant: bool = True,
    reduction: DepthReduction = "median",
    regularizer_strength: float = 0.02,
    max_iter: int = 2,
    tol: float = 1e-3,
    max_res: int = 1024,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Depth maps, each known up to a factor and a constant, aligned with each other and reduced to one.

    The alignment makes the differences between all pairs small, and keeps the result near 0..1. It is found by a few
    steps of BFGS with a cost in float64; diffusers differentiates a cost in float32 by differences of 1e-8, so that
    chance has a part in its result.

    Args:
        depths: (E, H, W, 1) in 0..1.
        scale_invariant: Whether the maps are known up to a factor.
        shift_invariant: Whether they are known up to a constant; only with a factor.
        reduction: "median", the lower one of an even number, or "mean".
        regularizer_strength: How much the distance of the result's ends from 0 and 1 costs.
        max_iter: The most steps.
        tol: Where the steps end.
        max_res: The longest side in pixels at which the maps are aligned.

    Returns:
        (H, W, 1) in 0..1, the depth; and (H, W, 1), its uncertainty: the median distance from it, or the deviation.

    Raises:
        ValueError: The maps are known up to a constant alone.
    """
    if shift_invariant and not scale_invariant:
        raise ValueError("shift_invariant without scale_invariant: such maps cannot be aligned")
    if scale_invariant:
        factors, shifts = _alignment(depths, shift_invariant, reduction, regularizer_strength, max_iter, tol, max_res)
        depths = depths * factors.astype(np.float32)[:, None, None, None]
        depths = depths + shifts.astype(np.float32)[:, None, None, None]
    depth = _reduced(depths, reduction)
    uncertainty = depths.std(axis=0, ddof=1) if reduction == "mean" else _reduced(np.abs(depths - depth), "median")
    if not scale_invariant:
        return depth, uncertainty
    least = depth.min() if shift_invariant else np.float32(0)
    extent = max(depth.max() - least, np.float32(LEAST))
    return (depth - least) / extent, uncertainty / extent


def ensemble_normals(
    normals: NDArray[np.float32], reduction: NormalsReduction = "closest"
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Unit normals reduced to one map.

    Args:
        normals: (E, H, W, 3).
        reduction: "mean", or "closest", the one of the E that is closest to the mean.

    Returns:
        (H, W, 3), the normals; and (H, W, 1), their uncertainty: the mean angle to the mean, as a share of half a turn.
    """
    mean = unit_length(normals.mean(axis=0))
    cosines = np.clip((mean * normals).sum(axis=-1, keepdims=True), -1, 1)
    uncertainty = (np.arccos(cosines).mean(axis=0) / np.pi).astype(np.float32)
    if reduction == "mean":
        return mean, uncertainty
    closest = cosines.argmax(axis=0)[None]
    return np.take_along_axis(normals, np.repeat(closest, 3, axis=-1), axis=0)[0], uncertainty


def unit_length(normals: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors (..., 3) divided by their lengths."""
    made: NDArray[np.float32] = normals / np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), LEAST)
    return made


def _reduced(maps: NDArray[np.floating], reduction: DepthReduction) -> NDArray[np.floating]:
    if reduction == "mean":
        mean: NDArray[np.floating] = maps.mean(axis=0)
        return mean
    middle = (len(maps) - 1) // 2
    median: NDArray[np.floating] = np.partition(maps, middle, axis=0)[middle]
    return median


def _alignment(
    depths: NDArray[np.float32],
    shifted: bool,
    reduction: DepthReduction,
    regularizer_strength: float,
    max_iter: int,
    tol: float,
    max_res: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The factor and the constant of each map, (E,) float64 both."""
    count, (height, width) = len(depths), depths.shape[1:3]
    if max(height, width) > max_res:
        size = longest_side(height, width, max_res)
        depths = np.stack([resample(depth, *size, "nearest-exact", antialias=True) for depth in depths])
    flat = depths.reshape(count, -1).astype(np.float64)
    least, most = flat.min(axis=1), flat.max(axis=1)
    factors = 1 / np.maximum(most - least if shifted else most, LEAST)
    first, second = np.triu_indices(count, 1)
    # The mean squared difference of two aligned maps is a form in their factors and constants.
    squares, means = flat @ flat.T / flat.shape[1], flat.mean(axis=1)

    def split(found: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return found[:count], found[count:] if shifted else np.zeros(count)

    def cost(found: NDArray[np.float64]) -> float:
        scales, shifts = split(found)
        moments = scales[:, None] * squares * scales + shifts[:, None] * shifts
        moments = moments + np.outer(scales * means, shifts) + np.outer(shifts, scales * means)
        own = np.diag(moments)
        distances = np.sqrt(np.maximum(own[first] + own[second] - 2 * moments[first, second], 0))
        total = float(distances.sum())
        if regularizer_strength > 0:
            result = _reduced(flat * scales[:, None] + shifts[:, None], reduction)
            total += float(abs(result.min()) + abs(1 - result.max())) * regularizer_strength
        return total

    start = np.concatenate([factors, -factors * least]) if shifted else factors
    found = scipy.optimize.minimize(cost, start, method="BFGS", tol=tol, options={"maxiter": max_iter})
    return split(found.x)
