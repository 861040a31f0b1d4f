"""FreeU against the definition of its filter by a Fourier transform; its factors are numbers like any other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.models.freeu import FreeU, reweight, scale_low_frequencies


@pytest.mark.parametrize(("height", "width"), [(8, 8), (6, 9), (5, 4), (1, 3), (2, 1), (1, 1)])
def test_the_filter_scales_low_frequencies(height, width):
    x = np.random.default_rng(0).standard_normal((2, height, width, 3), np.float32)
    mask = np.ones((height, width))
    rows, columns = (slice(max(n // 2 - 1, 0), n // 2 + 1) for n in (height, width))
    mask[rows, columns] = 0.3
    shifted = np.fft.fftshift(np.fft.fft2(x, axes=(1, 2)), axes=(1, 2)) * mask[..., None]
    want = np.fft.ifft2(np.fft.ifftshift(shifted, axes=(1, 2)), axes=(1, 2)).real
    np.testing.assert_allclose(scale_low_frequencies(jnp.asarray(x), 0.3), want, atol=1e-6)


def test_the_two_lowest_levels_alone_change_and_nothing_compiles_anew():
    x, skip = jnp.ones((1, 4, 4, 6), jnp.bfloat16), jnp.ones((1, 4, 4, 2), jnp.bfloat16)
    traces = []

    @jax.jit
    def run(freeu):
        traces.append(None)
        return [reweight(x, skip, level, freeu) for level in range(3)]

    for factors in (FreeU(0.5, 0.25, 2.0, 3.0), FreeU(1.0, 1.0, 1.0, 1.0)):
        for level, (a, b) in enumerate(run(factors)):
            s, bb = ((factors.s1, factors.b1), (factors.s2, factors.b2), (1, 1))[level]
            assert a.dtype == b.dtype == jnp.bfloat16
            np.testing.assert_array_equal(np.asarray(a, np.float32)[0, 0, 0], [bb, bb, bb, 1, 1, 1])
            np.testing.assert_allclose(np.asarray(b, np.float32), s, rtol=1e-2)  # a constant is of frequency 0
    assert len(traces) == 1
