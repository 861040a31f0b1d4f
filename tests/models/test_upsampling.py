"""The folded upsampling is the repeated one, in less arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from unclip_jax.models import platform
from unclip_jax.models.convolution import convolve
from unclip_jax.models.layers import Conv, upsample_nearest
from unclip_jax.models.upsampling import convolve_folded, upsample_and_convolve
from unclip_jax.models.winograd import transform_kernel


def given(height, width, channels=(8, 6), seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, height, width, channels[0]), np.float32)
    kernel = rng.standard_normal((3, 3, *channels), np.float32) / np.float32(9 * channels[0]) ** 0.5
    return jnp.asarray(x), jnp.asarray(kernel)


def relative(got, want):
    return np.linalg.norm(np.asarray(got - want, np.float64)) / np.linalg.norm(np.asarray(want, np.float64))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (5, 4)])
def test_float32(height, width):
    x, kernel = given(height, width)
    got, want = convolve_folded(x, kernel), convolve(upsample_nearest(x), kernel)
    assert got.shape == want.shape
    assert relative(got, want) < 3e-7  # measured: 1e-7


def test_bfloat16_is_as_near_to_float32_as_the_repeated_form():
    x, kernel = given(16, 16, (64, 64))
    want = convolve(upsample_nearest(x), kernel)
    x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    folded, repeated = convolve_folded(x, kernel), convolve(upsample_nearest(x), kernel)
    assert folded.dtype == jnp.bfloat16
    assert relative(folded.astype(jnp.float32), want) < 1.3 * relative(repeated.astype(jnp.float32), want)


def test_gradients():
    x, kernel = given(3, 4)
    weights = np.random.default_rng(1).standard_normal((2, 6, 8, 6), np.float32)

    def loss(function):
        return jax.grad(lambda x, kernel: (function(x, kernel) * weights).sum(), argnums=(0, 1))(x, kernel)

    folded, repeated = loss(convolve_folded), loss(lambda x, kernel: convolve(upsample_nearest(x), kernel))
    for got, want in zip(folded, repeated, strict=True):
        assert relative(got, want) < 1e-6


def test_it_is_four_ninths_of_the_arithmetic():
    x, kernel = given(32, 32, (64, 64))

    def flops(function):
        return jax.jit(function).lower(x, kernel).compile().cost_analysis()["flops"]

    share = flops(convolve_folded) / flops(lambda x, kernel: convolve(upsample_nearest(x), kernel))
    assert 0.42 < share < 0.48


def convolution(kernel, bias):
    conv = Conv(*kernel.shape[-2:], rngs=nnx.Rngs(0))
    conv.kernel, conv.bias = nnx.Param(kernel), nnx.Param(bias)
    return conv


@pytest.mark.parametrize("accelerator", ["cpu", "tpu"])
def test_the_platform_chooses(accelerator, monkeypatch):
    """A program for an accelerator has the 4x4 kernel, if there are enough pixels; for a CPU it is what it was."""
    monkeypatch.setattr(platform, "accelerator", lambda: accelerator)
    conv = convolution(given(1, 1)[1], jnp.arange(6.0))
    for side, worth in ((32, True), (31, False)):
        x, _ = given(side, side)
        traced = jax.jit(lambda x: upsample_and_convolve(conv, x)).trace(x)
        for target in ("cpu", "tpu"):
            text = traced.lower(lowering_platforms=(target,)).as_text()
            assert ("lhs_dilate = [2, 2]" in text) == (worth and target == accelerator == "tpu")
    want = convolve(upsample_nearest(x), conv.kernel[...], jnp.arange(6.0))
    np.testing.assert_allclose(upsample_and_convolve(conv, x), want, rtol=1e-5, atol=1e-6)


def test_transformed_kernels_are_for_a_cpu(monkeypatch):
    monkeypatch.setattr(platform, "accelerator", lambda: "gpu")
    x, kernel = given(32, 32, (128, 128))
    conv = convolution(jnp.asarray(transform_kernel(np.asarray(kernel), 4)), jnp.zeros(128))
    assert relative(upsample_and_convolve(conv, x), convolve(upsample_nearest(x), kernel)) < 3e-6
