"""The pipeline's promises: a picture is its seed's, index's and inputs' alone; scalars compile nothing; streams end."""

import dataclasses

import numpy as np
import pytest

from tests.pipelines.small_family import Compilations
from unclip_jax.reference import Reference

STEPS = 4


def photo(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (80, 70, 3), np.uint8)


@pytest.fixture(scope="module")
def pipe(opened):
    return opened()


@pytest.fixture(scope="module")
def split_pipe(opened):
    """The same pipeline over four devices."""
    return opened(4)


def run(pipe, **changes):
    settings = {"num_inference_steps": STEPS, "seed": 3, "scheduler": "ddim", "eta": 1.0, "noise_level": 300}
    settings |= {"image": photo(), "output_type": "latent", **changes}
    return pipe(**settings).latents


# Networks round otherwise in batches of other sizes, and guidance of 10 multiplies it: measured 1.2e-5 on a CPU without
# AVX-512, less with it. Another draw of noise would be off by 1.
def assert_close(got, want, tolerance=2e-5):
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


@pytest.fixture(scope="module")
def five(pipe):
    return run(pipe, num_images_per_prompt=5)


def test_an_image_does_not_depend_on_what_is_made_beside_it(pipe, five):
    assert_close(run(pipe, num_images_per_prompt=2), five[:2])
    assert_close(run(pipe, num_images_per_prompt=5, batch_size=2), five)
    assert_close(run(pipe, image=[photo(), photo(1)], num_images_per_prompt=2)[:2], five[:2])


def test_an_image_does_not_depend_on_the_devices(split_pipe, five):
    """Five images on four devices: padded to eight, and trimmed."""
    assert_close(run(split_pipe, num_images_per_prompt=5), five)
    assert_close(run(split_pipe, num_images_per_prompt=5, batch_size=3), five)


def test_images_differ_by_index_seed_prompt_and_noise(pipe, five):
    others = [five[0], five[1], run(pipe, seed=4)[0], run(pipe, prompt="a cat")[0], run(pipe, noise_level=900)[0]]
    others += [run(pipe, image=photo(1))[0], run(pipe, eta=0.0)[0], run(pipe, guidance_scale=2.0)[0]]
    for i, a in enumerate(others):
        for b in others[:i]:
            assert np.linalg.norm(a - b) > 1e-3 * np.linalg.norm(b)


def test_scalars_compile_nothing(pipe, five):
    run(pipe)  # whatever is compiled for one image
    with Compilations() as compiled:
        for change in (
            {"guidance_scale": 3.3},
            {"noise_level": 777},
            {"eta": 0.25},
            {"seed": 99},
            {"prompt": "something else", "negative_prompt": "blurry"},
            {"image": photo(5)},
            {"guidance_scale": [1.5, 2.5, 3.5, 4.5]},
        ):
            run(pipe, **change)
    assert compiled.count == 0
    with Compilations() as compiled:  # what counts, when there is something
        run(pipe, num_inference_steps=STEPS + 1)
    assert compiled.count > 0


@pytest.mark.parametrize("which", ["pipe", "split_pipe"])
def test_a_stream_is_the_same_run_and_can_be_closed(which, request):
    pipe = request.getfixturevalue(which)
    settings = {"image": photo(), "num_inference_steps": STEPS, "seed": 3, "scheduler": "ddim", "eta": 1.0}
    whole = pipe(output_type="latent", num_images_per_prompt=2, **settings).latents
    states = list(pipe.stream(num_images_per_prompt=2, **settings))
    assert [(s.step, s.num_steps) for s in states] == [(i + 1, STEPS) for i in range(STEPS)]
    assert_close(states[-1].latents, whole)
    height, width = whole.shape[1:3]
    assert [p.size for p in states[0].preview()] == [(width, height)] * 2
    assert states[-1].decode()[0].size[0] > width
    stream = pipe.stream(num_images_per_prompt=2, **settings)
    next(stream)
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)
    assert_close(pipe(output_type="latent", num_images_per_prompt=2, **settings).latents, whole)


@pytest.mark.parametrize("reference", list(Reference))
def test_output_types(opened, reference):
    pipe = opened()
    pipe.config = dataclasses.replace(pipe.config, reference=reference)
    settings = {"image": photo(), "num_inference_steps": STEPS, "seed": 3}
    pictures, arrays, latents = (pipe(output_type=kind, **settings) for kind in ("pil", "np", "latent"))
    assert arrays.images.dtype == np.float32
    assert arrays.images.min() >= 0
    assert arrays.images.max() <= 1
    levels = np.floor(arrays.images[0] * 255) if reference == Reference.ORIGINAL else np.round(arrays.images[0] * 255)
    np.testing.assert_array_equal(np.asarray(pictures.images[0]), levels)
    np.testing.assert_array_equal(latents.images, latents.latents)
    np.testing.assert_allclose(pipe.decode_latents(latents.latents), arrays.images, atol=1e-5)


def test_embeddings_of_a_image_stand_for_it(pipe):
    embeds = pipe.encode_image_embeds([photo()])
    assert_close(run(pipe, image=None, image_embeds=embeds), run(pipe))
    states = pipe.encode_prompts(["a cat", ""])
    given = {"prompt_embeds": states[:1], "negative_prompt_embeds": states[1:]}
    assert_close(run(pipe, **given), run(pipe, prompt="a cat"))


def test_mixing(pipe):
    """With all weight on one picture the mix is that picture; weights count by their proportions alone."""
    pair = [photo(), photo(1)]
    noise = np.random.default_rng(0).standard_normal((1, 2, pipe.config.image_encoder.projection_dim), np.float32)
    alone = run(pipe, image_noise=noise[:, 0])
    assert_close(run(pipe, image=pair, image_weights=[1, 0], image_noise=noise), alone)
    half = run(pipe, image=pair, image_weights=[1, 1], image_noise=noise)
    assert_close(run(pipe, image=pair, image_weights=[0.25, 0.25], image_noise=noise), half)
    assert np.linalg.norm(half - alone) > 1e-3 * np.linalg.norm(alone)
    assert run(pipe, image=pair, image_weights=[1, 2], mix_noise_level=100, num_images_per_prompt=3).shape[0] == 3


def test_guidance_by_step_and_by_image(pipe):
    plain = run(pipe, num_images_per_prompt=2, guidance_scale=4.0)
    assert_close(run(pipe, num_images_per_prompt=2, guidance_scale=[4.0] * STEPS), plain)
    by_image = run(pipe, num_images_per_prompt=2, guidance_scale=[4.0, 7.0])
    assert_close(by_image[:1], plain[:1])
    assert_close(by_image[1:], run(pipe, num_images_per_prompt=2, guidance_scale=7.0)[1:])
    # Without guidance the doubled batch is left out; with a scale of 1 in every step it is not, and counts for nothing.
    assert_close(run(pipe, guidance_scale=[1.0] * STEPS), run(pipe, guidance_scale=1.0))


def test_bfloat16_is_near_float32(opened, pipe):
    half = opened(dtype="bfloat16")
    settings = {"eta": 0.0, "guidance_scale": 2.0}
    got, want = run(half, **settings), run(pipe, **settings)
    assert got.dtype == np.float32
    assert np.isfinite(got).all()
    assert_close(got, want, 5e-2)
