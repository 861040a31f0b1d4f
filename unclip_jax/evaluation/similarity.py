"""What embeddings say: agreement with a text, what a variation keeps, how much variations differ, retrieval."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def _unit(x: ArrayLike) -> NDArray[np.float64]:
    rows = np.asarray(x, np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-30)


def cosines(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """The cosine of each row of one with that row of the other: (N, D) twice -> (N,).

    Of images and their texts it is the CLIP score of the model card (Hessel et al. 2021, arXiv:2104.08718, without
    its factor); of variations and their sources it is retention.
    """
    return (_unit(first) * _unit(second)).sum(axis=-1)


def diversity(embeddings: ArrayLike) -> float:
    """One minus the mean cosine of two different rows: of variations of one image, (N, D), N at least 2; 0 to 2."""
    x = _unit(embeddings)
    if len(x) < 2:
        raise ValueError(f"diversity wants at least 2 embeddings, got {len(x)}")
    total = np.square(x.sum(axis=0)).sum() - len(x)
    return float(1 - total / (len(x) * (len(x) - 1)))


def retrieval(queries: ArrayLike, gallery: ArrayLike, wanted: ArrayLike) -> NDArray[np.intp]:
    """The place of each query's own entry among a gallery's, nearest first, 0 the nearest: (N,).

    queries: (N, D); gallery: (M, D); wanted: (N,), the index of each one's own entry. Entries just as near count as
    nearer, so that a gallery of equal rows is no success.
    """
    close = _unit(queries) @ _unit(gallery).T
    own = close[np.arange(len(close)), np.asarray(wanted)]
    return (close >= own[:, None] - 1e-12).sum(axis=1) - 1
