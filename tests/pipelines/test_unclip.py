"""What image variations have beside the promises of all pipelines, which are in test_family.py."""

import dataclasses

import numpy as np
import pytest

from tests.pipelines.small_family import STEPS, arguments, photo
from unclip_jax.reference import Reference


@pytest.fixture(scope="module")
def pipe(family):
    return family("variations")


def run(pipe, **changes):
    return pipe(**arguments("variations", prompt="", guidance_scale=10.0) | changes).latents


# Networks round otherwise in batches of other sizes, and guidance of 10 multiplies it: measured 1.2e-5 on a CPU without
# AVX-512, less with it. Another draw of noise would be off by 1.
def assert_close(got, want, tolerance=2e-5):
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


def test_images_differ_by_index_seed_prompt_and_noise(pipe):
    others = [*run(pipe, num_images_per_prompt=2), run(pipe, seed=4)[0], run(pipe, prompt="a cat")[0]]
    others += [run(pipe, noise_level=900)[0], run(pipe, image=photo(1))[0]]
    others += [run(pipe, eta=0.0)[0], run(pipe, guidance_scale=2.0)[0]]
    for i, a in enumerate(others):
        for b in others[:i]:
            assert np.linalg.norm(a - b) > 1e-3 * np.linalg.norm(b)


def test_of_a_list_of_seeds_each_prompt_has_one(pipe):
    """Each of its images is the one of a call that has that prompt and that seed alone."""
    together = run(pipe, image=[photo(), photo(1)], seed=[5, 4], num_images_per_prompt=2)
    assert_close(together[:2], run(pipe, seed=5, num_images_per_prompt=2))
    assert_close(together[2:], run(pipe, image=photo(1), seed=4, num_images_per_prompt=2))
    for seeds, message in (([1], "seed has 1 values; want one, or 2"), ([1, -1], "seed is -1"), ("ab", "seed is 'ab'")):
        with pytest.raises(ValueError, match=message):
            pipe.check(**arguments("variations", image=[photo(), photo(1)], seed=seeds))


@pytest.mark.parametrize("reference", list(Reference))
def test_output_types_agree(opened, reference):
    pipe = opened()
    pipe.config = dataclasses.replace(pipe.config, reference=reference)
    pictures, arrays, latents = (pipe(**arguments("variations", output_type=kind)) for kind in ("pil", "np", "latent"))
    assert arrays.images.dtype == np.float32
    assert arrays.images.min() >= 0
    assert arrays.images.max() <= 1
    levels = np.floor(arrays.images[0] * 255) if reference == Reference.ORIGINAL else np.round(arrays.images[0] * 255)
    np.testing.assert_array_equal(np.asarray(pictures.images[0]), levels)
    np.testing.assert_array_equal(latents.images, latents.latents)
    np.testing.assert_allclose(pipe.decode_latents(latents.latents), arrays.images, atol=1e-5)


def test_embeddings_of_an_image_stand_for_it(pipe):
    embeds = pipe.encode_image_embeds([photo()])
    assert_close(run(pipe, image=None, image_embeds=embeds), run(pipe))
    states = pipe.encode_prompts(["a cat", ""])
    given = {"prompt_embeds": states[:1], "negative_prompt_embeds": states[1:]}
    assert_close(run(pipe, **given), run(pipe, prompt="a cat"))


def test_images_are_mixed_by_their_weights(pipe):
    """With all weight on one image the mix is that image; weights count by their proportions alone."""
    pair = [photo(), photo(1)]
    noise = np.random.default_rng(0).standard_normal((1, 2, pipe.config.image_encoder.projection_dim), np.float32)
    alone = run(pipe, image_noise=noise[:, 0])
    assert_close(run(pipe, image=pair, image_weights=[1, 0], image_noise=noise), alone)
    half = run(pipe, image=pair, image_weights=[1, 1], image_noise=noise)
    assert_close(run(pipe, image=pair, image_weights=[0.25, 0.25], image_noise=noise), half)
    assert np.linalg.norm(half - alone) > 1e-3 * np.linalg.norm(alone)
    assert run(pipe, image=pair, image_weights=[1, 2], mix_noise_level=100, num_images_per_prompt=3).shape[0] == 3


def test_guidance_may_differ_by_step_and_by_image(pipe):
    plain = run(pipe, num_images_per_prompt=2, guidance_scale=4.0)
    assert_close(run(pipe, num_images_per_prompt=2, guidance_scale=[4.0] * STEPS), plain)
    by_image = run(pipe, num_images_per_prompt=2, guidance_scale=[4.0, 7.0])
    assert_close(by_image[:1], plain[:1])
    assert_close(by_image[1:], run(pipe, num_images_per_prompt=2, guidance_scale=7.0)[1:])
    # However it is given, a scale of 1 is no guidance.
    assert_close(run(pipe, guidance_scale=[1.0] * STEPS), run(pipe, guidance_scale=1.0))


def test_bfloat16_is_near_float32(opened, pipe):
    half = opened(dtype="bfloat16")
    settings = {"eta": 0.0, "guidance_scale": 2.0}
    got, want = run(half, **settings), run(pipe, **settings)
    assert got.dtype == np.float32
    assert np.isfinite(got).all()
    assert_close(got, want, 5e-2)
