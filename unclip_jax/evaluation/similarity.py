"""Measures on embeddings: agreement with a text, what a variation keeps, how much variations differ, retrieval."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def _unit(x: ArrayLike) -> NDArray[np.float64]:
    rows = np.asarray(x, np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-30)


def cosines(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """The cosine of each row of one array with the same row of the other.

    For images and their texts it is the CLIP score of the model card (Hessel et al. 2021, arXiv:2104.08718, without its
    factor); for variations and their sources it is retention.

    Args:
        first: (N, D).
        second: (N, D).

    Returns:
        (N,).
    """
    return (_unit(first) * _unit(second)).sum(axis=-1)


def diversity(embeddings: ArrayLike) -> float:
    """One minus the mean cosine of two different rows, 0 to 2, for variations of one image.

    Args:
        embeddings: (N, D), N at least 2.

    Returns:
        The diversity.

    Raises:
        ValueError: There are fewer than two rows.
    """
    x = _unit(embeddings)
    if len(x) < 2:
        raise ValueError(f"diversity needs at least 2 embeddings; there are {len(x)}")
    total = np.square(x.sum(axis=0)).sum() - len(x)
    return float(1 - total / (len(x) * (len(x) - 1)))


def retrieval(queries: ArrayLike, gallery: ArrayLike, wanted: ArrayLike) -> NDArray[np.intp]:
    """The rank of each query's own entry in a gallery, with 0 for the nearest.

    Equally near entries count as nearer, so a gallery of equal rows is not a success.

    Args:
        queries: (N, D).
        gallery: (M, D).
        wanted: (N,), the index of each query's own entry.

    Returns:
        (N,) integers.
    """
    close = _unit(queries) @ _unit(gallery).T
    own = close[np.arange(len(close)), np.asarray(wanted)]
    return (close >= own[:, None] - 1e-12).sum(axis=1) - 1
