"""Attention: which implementation runs where, and each of them that a CPU can run against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from unclip_jax.models import attention
from unclip_jax.models.attention import attend, attention_kernel

F32, BF16 = jnp.float32, jnp.bfloat16

CHOICES = [
    (("cpu", F32, 256, 77, 64, False), "plain"),
    (("cpu", F32, 4096, 4096, 64, False), "heads"),
    (("cpu", BF16, 4096, 4096, 64, False), "heads"),
    (("gpu", BF16, 4096, 4096, 64, False), "cudnn"),
    (("gpu", BF16, 9216, 77, 64, False), "cudnn"),
    (("gpu", F32, 4096, 4096, 64, False), "plain"),
    (("gpu", F32, 9216, 9216, 64, False), "queries"),
    (("gpu", BF16, 4096, 4096, 512, False), "plain"),  # the VAE's one head is too wide for cuDNN
    (("gpu", BF16, 9216, 9216, 512, False), "queries"),
    (("tpu", BF16, 4096, 4096, 64, False), "flash"),
    (("tpu", F32, 9216, 9216, 512, False), "flash"),
    (("tpu", BF16, 4096, 77, 64, False), "plain"),  # the text does not fill a block
    (("rocm", BF16, 9216, 9216, 64, False), "queries"),
    (("cpu", F32, 77, 77, 64, True), "plain"),
    (("gpu", BF16, 77, 77, 64, True), "plain"),
]


@pytest.mark.parametrize(("situation", "kernel"), CHOICES)
def test_the_choice(situation, kernel):
    assert attention_kernel(*situation) == kernel


def definition(q, k, v, bias=0.0):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    logits = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1]) + bias
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)


def inputs(b, t, s, n, h, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((b, t, n, h), (b, s, n, h), (b, s, n, h)))


@given(st.integers(1, 2), st.integers(1, 70), st.integers(1, 70), st.integers(1, 3), st.sampled_from([1, 5, 16]))
@settings(max_examples=15)
def test_every_form_is_the_definition(b, t, s, n, h):
    q, k, v = inputs(b, t, s, n, h)
    want = definition(q, k, v)
    for form in (attention._plain, attention._queries, attention._heads, attend):
        np.testing.assert_allclose(form(q, k, v), want, atol=2e-6)


@pytest.mark.parametrize("block", [1, 700, 10_000])
def test_blocks_that_do_not_divide_the_queries(block, monkeypatch):
    monkeypatch.setattr(attention, "_HEADS_BLOCK", block)
    monkeypatch.setattr(attention, "_QUERIES_BLOCK", block)
    q, k, v = inputs(2, 37, 53, 2, 8)
    for form in (attention._queries, attention._heads):
        np.testing.assert_allclose(form(q, k, v), definition(q, k, v), atol=2e-6)


def test_large_logits_do_not_overflow():
    q, k, v = inputs(1, 40, 40, 1, 8)
    got = attention._heads(100 * q, 100 * k, v)
    np.testing.assert_allclose(got, definition(100 * q, 100 * k, v), atol=1e-4)


def test_a_causal_bias():
    q, k, v = inputs(2, 20, 20, 2, 8)
    future = np.triu(np.full((20, 20), -np.inf, np.float32), 1)
    np.testing.assert_allclose(attend(q, k, v, jnp.asarray(future)), definition(q, k, v, future), atol=2e-6)


@pytest.mark.parametrize("form", [attention._plain, attention._queries, attention._heads])
def test_gradients(form, monkeypatch):
    monkeypatch.setattr(attention, "_HEADS_BLOCK", 100)
    monkeypatch.setattr(attention, "_QUERIES_BLOCK", 100)
    check_grads(form, inputs(1, 11, 7, 2, 4), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_under_jit_and_vmap():
    q, k, v = inputs(6, 33, 21, 2, 8)
    want = definition(q, k, v)
    np.testing.assert_allclose(jax.jit(attend)(q, k, v), want, atol=2e-6)
    parts = (a.reshape(3, 2, *a.shape[1:]) for a in (q, k, v))
    np.testing.assert_allclose(jax.jit(jax.vmap(attend))(*parts).reshape(want.shape), want, atol=2e-6)


def test_half_precision_accumulates_in_float32():
    q, k, v = inputs(1, 300, 300, 2, 64, dtype=BF16)
    got = attend(q, k, v)
    assert got.dtype == BF16
    want = definition(q, k, v)
    assert np.linalg.norm(np.asarray(got, np.float64) - want) < 5e-3 * np.linalg.norm(want)


@pytest.mark.usefixtures("fully_compiled")
def test_memory_is_far_below_that_of_all_logits():
    """At 4096 tokens: forwards, and backwards as well."""
    q, k, v = (jax.ShapeDtypeStruct((2, 4096, 5, 64), F32) for _ in range(3))
    logits = 2 * 5 * 4096 * 4096 * 4
    forward = jax.jit(attend).lower(q, k, v).compile().memory_analysis()
    assert forward.temp_size_in_bytes < logits / 5
    gradient = jax.jit(jax.grad(lambda *a: attend(*a).sum(), argnums=(0, 1, 2))).lower(q, k, v).compile()
    assert gradient.memory_analysis().temp_size_in_bytes < logits / 3
