"""Random numbers by image: the same whatever is drawn beside them, different in every use, and standard normal."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.sampling import Branch, draw, image_keys
from unclip_jax.sampling.noise import branch

SHAPE = (8, 8, 4)


def test_an_images_noise_depends_on_seed_and_index_alone():
    whole = draw(image_keys(5, jnp.arange(6)), Branch.LATENTS, SHAPE)
    for indices in ([3], [5, 0], [2, 2, 2]):
        part = draw(image_keys(5, jnp.array(indices)), Branch.LATENTS, SHAPE)
        np.testing.assert_array_equal(part, whole[jnp.array(indices)])
    np.testing.assert_array_equal(
        jax.jit(lambda seed: draw(image_keys(seed, jnp.arange(6)), Branch.LATENTS, SHAPE))(5), whole
    )


def test_each_image_may_have_a_seed_of_its_own():
    seeds, indices = jnp.array([7, 2**32 - 1, 7], jnp.uint32), jnp.array([2, 0, 5])
    keys = image_keys(seeds, indices)
    for row, (seed, index) in enumerate(zip(seeds.tolist(), indices.tolist(), strict=True)):
        assert keys[row] == image_keys(seed, jnp.array([index]))[0]


def test_every_use_has_noise_of_its_own():
    draws = {
        (seed, branch, number, index): np.asarray(draw(image_keys(seed, jnp.array([index])), branch, SHAPE, number))
        for seed, branch, number, index in itertools.product((0, 1), Branch, (0, 1, 2), (0, 1))
    }
    for (a, x), (b, y) in itertools.combinations(draws.items(), 2):
        correlation = np.corrcoef(x.ravel(), y.ravel())[0, 1]
        assert abs(correlation) < 0.3, (a, b)  # 256 numbers: 5 standard deviations


def test_noise_is_standard_normal():
    noise = np.asarray(draw(image_keys(0, jnp.arange(256)), Branch.STEP, SHAPE, 4))
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert abs((np.abs(noise) < 1).mean() - 0.6827) < 0.01


def test_noise_is_the_same_in_every_release():
    """Images of a seed must not change from release to release: recorded with jax 0.10.2."""
    noise = draw(image_keys(1234, jnp.array([0, 7])), Branch.LATENTS, (3,))
    np.testing.assert_allclose(noise, RECORDED, rtol=1e-6)


RECORDED = np.array([[0.58472037, 1.7919017, 0.79230267], [1.8491466, -0.36792418, -1.5026914]], np.float32)


def test_a_run_within_a_run_draws_numbers_of_its_own():
    keys = image_keys(0, jnp.arange(2))
    inner = branch(keys, Branch.PRIOR)
    draws = [draw(k, name, (8,)) for k in (keys, inner) for name in Branch]
    assert len({tuple(np.asarray(row).tolist()) for made in draws for row in made}) == 2 * 2 * len(Branch)
