"""The training losses of CLIP's towers: of all pairs in a batch, matching ones should be nearest."""

import jax
import jax.numpy as jnp

from unclip_jax.models.clip import similarity


def contrastive_loss(
    first: jax.Array,
    second: jax.Array,
    logit_scale: jax.Array,
    labels: jax.Array | None = None,
) -> jax.Array:
    """The mean cross-entropy of finding each embedding's partner among all, in both directions.

    Args:
        first: (B, D), of any length.
        second: (B, D), of any length; row i belongs to row i of `first`. Embeddings of images and texts (Radford et al.
            2021, arXiv:2103.00020), or of two images of one thing.
        logit_scale: (), the logarithm of a factor.
        labels: (B,) int; rows with equal labels belong together, too, and share the target (two images with one caption
            are not a mistake). None if every row is distinct.

    Returns:
        (), nats.
    """
    logits = similarity(first, second, logit_scale)
    if labels is None:
        targets = jnp.eye(len(logits))
    else:
        same = (labels[:, None] == labels[None, :]).astype(jnp.float32)
        targets = same / same.sum(axis=1, keepdims=True)
    rows = -(targets * jax.nn.log_softmax(logits, axis=1)).sum(axis=1)
    columns = -(targets.T * jax.nn.log_softmax(logits, axis=0)).sum(axis=0)
    return 0.5 * (rows.mean() + columns.mean())


def decorrelation_loss(embeddings: jax.Array) -> jax.Array:
    """The mean squared correlation of two features: how much an embedding repeats itself.

    Source: Barlow Twins' redundancy term (Zbontar et al. 2021, arXiv:2103.03230) for one view.

    Args:
        embeddings: (B, D).

    Returns:
        ().
    """
    x = embeddings.astype(jnp.float32)
    x = (x - x.mean(axis=0)) / (x.std(axis=0) + 1e-4)
    correlation = jnp.matmul(x.T, x, precision="highest") / len(x)
    different = 1 - jnp.eye(x.shape[1])
    return jnp.square(correlation * different).sum() / different.sum()


def effective_rank(embeddings: jax.Array) -> jax.Array:
    """The number of directions that embeddings use.

    It is exp of the entropy of their covariance's spectrum (Roy & Vetterli 2007).

    Args:
        embeddings: (N, D).

    Returns:
        (), between 1 and min(N - 1, D).
    """
    centred = embeddings.astype(jnp.float32) - embeddings.mean(axis=0)
    spectrum = jnp.square(jnp.linalg.svd(centred, compute_uv=False))
    share = spectrum / spectrum.sum()
    return jnp.exp(-jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1.0)), 0.0).sum())
