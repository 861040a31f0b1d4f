"""The Fréchet distance of two sets of features, from statistics that can be gathered in any order and merged.

With Inception's features it is FID (Heusel et al. 2017, arXiv:1706.08500), with CLIP's it is CLIP-FID (Kynkäänniemi et
al. 2022, arXiv:2203.06026).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Moments(NamedTuple):
    """The moments of a set of features.

    Attributes:
        size: The number of features.
        mean: (D,) float64.
        scatter: (D, D) float64, the sum of the centred outer products.
    """

    size: int
    mean: NDArray[np.float64]
    scatter: NDArray[np.float64]

    @property
    def covariance(self) -> NDArray[np.float64]:
        """The sample covariance, (D, D).

        Raises:
            ValueError: There are fewer than two features.
        """
        if self.size < 2:
            raise ValueError(f"a covariance needs at least 2 features; there are {self.size}")
        return self.scatter / (self.size - 1)


def no_moments(width: int) -> Moments:
    """The moments of an empty set."""
    return Moments(0, np.zeros(width), np.zeros((width, width)))


def moments(features: ArrayLike) -> Moments:
    """The moments of features (N, D), N >= 1, of any floating dtype."""
    x = np.asarray(features, np.float64)
    mean = x.mean(axis=0)
    centred = x - mean
    return Moments(len(x), mean, centred.T @ centred)


def merge(first: Moments, second: Moments) -> Moments:
    """The moments of both sets together (Chan et al. 1983): exact, in any order."""
    size = first.size + second.size
    if not size:
        return first
    apart = second.mean - first.mean
    mean = first.mean + apart * (second.size / size)
    between = np.outer(apart, apart) * (first.size * second.size / size)
    return Moments(size, mean, first.scatter + second.scatter + between)


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), never negative except for rounding.

    The root's trace is the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric: no
    imaginary part appears, and singular covariances do no harm.

    Args:
        first: Moments of one set.
        second: Moments of the other.

    Returns:
        The distance.

    Raises:
        ValueError: A set has fewer than two features.
    """
    one, two = first.covariance, second.covariance
    values, vectors = np.linalg.eigh(one)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ two @ root), 0)).sum()
    return float(np.square(first.mean - second.mean).sum() + np.trace(one) + np.trace(two) - 2 * shared)
