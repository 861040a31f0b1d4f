"""DeepCache: which evaluations run the whole UNet, what goes with it, and what does not."""

import dataclasses

import numpy as np
import pytest

from tests import small_models
from tests.pipelines import small_family
from tests.pipelines.small_family import arguments, task_of

CALL = {"height": 20, "width": 24, "num_inference_steps": 5, "scheduler": "ddim", "seed": 3, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = small_models.write(small_models.TEXT_TO_IMAGE, tmp_path_factory.mktemp("cache") / "model")
    return small_family.open_pipeline(folder, "TextToImagePipeline", progress=False)


def test_it_changes_an_image_the_more_the_rarer_the_whole_unet_runs(pipe):
    exact, *others = (pipe("a cat", **CALL, deep_cache=every).latents for every in (1, 2, 5))
    errors = [np.linalg.norm(made - exact) / np.linalg.norm(exact) for made in others]
    assert 1e-6 < errors[0] < errors[1] < 1


def test_one_step_is_whole(pipe):
    once = {**CALL, "num_inference_steps": 1}
    exact = pipe("a cat", **once).latents
    np.testing.assert_allclose(pipe("a cat", **once, deep_cache=4).latents, exact, atol=1e-5)  # measured 5e-7


def test_its_number_is_a_value_and_chunks_and_steps_change_nothing(pipe):
    made = pipe("a cat", **CALL, num_images_per_prompt=2, deep_cache=3).latents
    with small_family.Compilations() as compilations:
        pipe("a cat", **CALL, num_images_per_prompt=2, deep_cache=2)
    assert compilations.count == 0
    one = pipe("a cat", **CALL, num_images_per_prompt=2, deep_cache=3, batch_size=1).latents
    np.testing.assert_allclose(one, made, atol=1e-4)
    del (call := dict(CALL))["output_type"]
    *_, last = pipe.stream("a cat", **call, num_images_per_prompt=2, deep_cache=3)
    np.testing.assert_allclose(last.latents, made, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"deep_cache": 0}, "deep_cache is 0; want an integer from 1 to 1000"),
        ({"deep_cache": 2.5}, "deep_cache is 2.5"),
        ({"deep_cache": 2, "guidance_interval": (0.1, 2.0)}, "deep_cache is 2, and guidance is off in some steps"),
        ({"deep_cache": 3, "guidance_scale": [1.0, 3.0, 3.0]}, "deep_cache is 3, and guidance is off in some steps"),
    ],
)
def test_what_does_not_go_together_is_named(changes, message):
    task, config = task_of("text to image")
    with pytest.raises(ValueError, match=message):
        task.check(config, task.arguments(**arguments("text to image", **changes)))


def test_tiles_do_not_go_with_it():
    task, config = task_of("upscaling")
    config = dataclasses.replace(config, unet=dataclasses.replace(config.unet, sample_size=8))
    with pytest.raises(ValueError, match="deep_cache is 2, and the image is made in tiles"):
        task.check(config, task.arguments(**arguments("upscaling", tile=4, deep_cache=2)))
