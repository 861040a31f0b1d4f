"""Learning rates, AdamW and its wrappings against what they are defined to be."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unclip_jax.training.ema import init_ema, update_ema
from unclip_jax.training.optimizer import adamw, learning_rate


def test_the_model_cards_schedule():
    rate = learning_rate(1e-4, 10_000)
    np.testing.assert_allclose([rate(s) for s in (0, 2500, 10_000, 10**7)], [0, 2.5e-5, 1e-4, 1e-4], rtol=1e-6)


@pytest.mark.parametrize(("decay", "middle"), [("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)])
def test_learning_rates_decay_as_told(decay, middle):
    rate = learning_rate(2.0, 10, decay, 110)
    np.testing.assert_allclose([rate(s) for s in (5, 10, 60)], [1.0, 2.0, 2 * middle], rtol=1e-6)
    np.testing.assert_allclose(rate(110), 2.0 if decay == "constant" else 0.0, atol=1e-6)
    assert learning_rate(2.0, 0, decay, 100)(0) == 2.0


def run(optimizer, gradients, params):
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def some(seed, count=3):
    rng = np.random.default_rng(seed)
    return [{"a": jnp.asarray(rng.standard_normal(4), jnp.float32), "b": jnp.float32(rng.standard_normal())}
            for _ in range(count)]  # fmt: skip


def test_adamw_by_hand():
    """Three steps of PyTorch's formulas: the decay comes first, and is not in the moments."""
    gradients, (params,) = some(0), some(1, 1)
    want = {}
    for name, start in params.items():
        p, m, v = np.array(start, np.float64), 0.0, 0.0
        for t, gradient in enumerate(gradients, 1):
            g = np.array(gradient[name], np.float64)
            p = p - 0.1 * 0.02 * p
            m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
            p = p - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-6)
        want[name] = p
    made = run(adamw(0.1, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.02), gradients, params)
    for name in params:
        np.testing.assert_allclose(made[name], want[name], rtol=1e-5)


def test_accumulation_is_the_mean_gradient():
    gradients, (params,) = some(0, 6), some(1, 1)
    means = [jax.tree.map(lambda *g: sum(g) / 3, *gradients[i : i + 3]) for i in (0, 3)]
    made, want = run(adamw(0.1, accumulate=3), gradients, params), run(adamw(0.1), means, params)
    for name in params:
        np.testing.assert_allclose(made[name], want[name], rtol=1e-5)


def test_clipping_is_by_the_norm_of_all():
    """Adam undoes the scale of a single step; over two of different size it shows."""
    gradients, (params,) = some(0, 2), some(1, 1)
    gradients[1] = jax.tree.map(lambda g: 100 * g, gradients[1])
    scales = [jnp.minimum(1, 0.5 / optax.tree.norm(gradient)) for gradient in gradients]
    clipped = [optax.tree.scale(scale, gradient) for scale, gradient in zip(scales, gradients, strict=True)]
    made, want = run(adamw(0.1, max_grad_norm=0.5), gradients, params), run(adamw(0.1), clipped, params)
    for name in params:
        np.testing.assert_allclose(made[name], want[name], rtol=1e-5)


def test_averages_begin_quickly():
    average = init_ema({"a": jnp.zeros(2)})
    seen = []
    for _ in range(4):
        average = update_ema(average, {"a": jnp.ones(2)}, decay=0.3)
        seen.append(float(average.params["a"][0]))
    left = np.cumprod([2 / 11, 3 / 12, 0.3, 0.3])  # of the beginning: (1 + n) / (10 + n), at most the decay
    np.testing.assert_allclose(seen, 1 - left, rtol=1e-5)
    assert int(average.updates) == 4
    assert average.params["a"].dtype == jnp.float32


def test_averages_of_half_precision_are_not():
    average = update_ema(init_ema({"a": jnp.ones(1, jnp.bfloat16)}), {"a": jnp.full(1, 2.0, jnp.bfloat16)})
    assert average.params["a"].dtype == jnp.float32
    np.testing.assert_allclose(average.params["a"], 1 + 9 / 11, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: learning_rate(0.0), "learning rate is 0.0"),
        (lambda: learning_rate(1.0, -1), "warmup_steps -1"),
        (lambda: learning_rate(1.0, 0, "step"), "decay is 'step'; accepted: constant, cosine, linear"),
        (lambda: learning_rate(1.0, 5, "cosine"), "total_steps is None"),
        (lambda: learning_rate(1.0, 5, "linear", 5), "total_steps is 5"),
        (lambda: adamw(1.0, max_grad_norm=0.0), "max_grad_norm is 0.0"),
        (lambda: adamw(1.0, accumulate=0), "accumulate is 0"),
    ],
)
def test_what_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
