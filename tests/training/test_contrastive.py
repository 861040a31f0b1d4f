"""The contrastive loss against torch-free definitions, and what it is for."""

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.training.contrastive import contrastive_loss, effective_rank


def embeddings(seed, rows=6, width=5):
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


def definition(a, b, scale, same):
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a.astype(float), b.astype(float)))
    p = np.exp(np.exp(scale) * a @ b.T)
    by_row, by_column = p / p.sum(1, keepdims=True), p / p.sum(0, keepdims=True)
    rows = [-np.mean([np.log(by_row[i, j]) for j in range(len(a)) if same[i, j]]) for i in range(len(a))]
    columns = [-np.mean([np.log(by_column[i, j]) for i in range(len(a)) if same[i, j]]) for j in range(len(a))]
    return (np.mean(rows) + np.mean(columns)) / 2


def test_the_loss_is_the_definition():
    a, b = embeddings(0), embeddings(1)
    np.testing.assert_allclose(contrastive_loss(a, b, jnp.float32(1.3)), definition(a, b, 1.3, np.eye(6)), rtol=1e-5)
    labels = np.array([0, 1, 0, 2, 1, 0])
    same = labels[:, None] == labels
    got = contrastive_loss(a, b, jnp.float32(0.4), jnp.asarray(labels))
    np.testing.assert_allclose(got, definition(a, b, 0.4, same), rtol=1e-5)
    distinct = contrastive_loss(a, b, jnp.float32(0.4), jnp.arange(6))
    np.testing.assert_allclose(distinct, contrastive_loss(a, b, jnp.float32(0.4)), rtol=1e-6)


def test_lengths_do_not_matter_and_chance_is_the_logarithm():
    a, b = embeddings(0), embeddings(1)
    np.testing.assert_allclose(
        contrastive_loss(3 * a, 0.1 * b, jnp.float32(1.0)), contrastive_loss(a, b, jnp.float32(1.0)), rtol=1e-5
    )
    np.testing.assert_allclose(contrastive_loss(a, 0 * a + 1, jnp.float32(1.0)), np.log(6), rtol=0.5)
    np.testing.assert_allclose(contrastive_loss(a, b, jnp.float32(-20.0)), np.log(6), rtol=1e-5)


def test_steps_bring_partners_together():
    a, b = jnp.asarray(embeddings(0)), jnp.asarray(embeddings(1))
    step = jax.jit(jax.value_and_grad(lambda a: contrastive_loss(a, b, jnp.float32(2.0))))
    before, _ = step(a)
    for _ in range(100):
        a = a - 0.5 * step(a)[1]
    assert step(a)[0] < 0.3 * before


def test_effective_rank():
    rng = np.random.default_rng(0)
    np.testing.assert_allclose(effective_rank(rng.standard_normal((20000, 8))), 8, rtol=0.01)
    line = np.outer(rng.standard_normal(100), np.ones(8))
    np.testing.assert_allclose(effective_rank(line), 1, rtol=0.01)
    two = rng.standard_normal((1000, 2)) @ rng.standard_normal((2, 8))
    assert 1 < effective_rank(two) <= 2.001
