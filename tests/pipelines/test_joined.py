"""Requests of calls of their own, joined into one."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.pipelines.small_family import KINDS, arguments, photo, task_of
from unclip_jax.pipelines.joined import company, join
from unclip_jax.pipelines.run import chunk_of
from unclip_jax.pipelines.unclip import image_labels


def checked(name, **changes):
    task, config = task_of(name)
    return task.check(config, task.arguments(**arguments(name, **changes)))


def leaves(value):
    """All that a request holds, by the way to it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
    if isinstance(value, dict):
        return {(name, *way): leaf for name, part in value.items() for way, leaf in leaves(part).items()}
    if isinstance(value, list | tuple):
        return {(i, *way): leaf for i, part in enumerate(value) for way, leaf in leaves(part).items()}
    return {(): value}


@pytest.mark.parametrize("name", KINDS)
def test_joined_requests_are_the_request_of_a_call_with_lists(name):
    """Of two pictures, prompts and seeds, each with two images."""
    one = {"num_images_per_prompt": 2, "negative_prompt": "a dog"}
    alone = [
        checked(name, **one, **of_each(name, i), prompt=prompt, seed=seed)
        for i, (prompt, seed) in enumerate((("a cat", 5), ("a hat", 2**32 - 1)))
    ]
    lists = {key: [of_each(name, i)[key] for i in range(2)] for key in of_each(name, 0)}
    together = checked(name, **one, **lists, prompt=["a cat", "a hat"], seed=[5, 2**32 - 1])
    assert company(alone[0]) == company(alone[1])
    got, want = leaves(join(alone)), leaves(together)
    assert got.keys() == want.keys()
    for way, leaf in want.items():
        if way[:2] != ("solver", "recipe"):
            np.testing.assert_array_equal(got[way], leaf, err_msg=str(way))


def of_each(name, number):
    """What each image of a kind has beside its prompt and seed."""
    settings = KINDS[name].settings
    return {key: photo(number) for key in ("image", "mask_image", "condition_image") if key in settings}


def test_requests_that_do_not_go_together_are_refused():
    one = checked("text to image")
    others = {
        "steps": {"num_inference_steps": 4},
        "eta": {"eta": 0.5},
        "solver": {"scheduler": "euler-a"},
        "size": {"height": 24},
        "guidance": {"guidance_scale": 1.0},
        "images": {"num_images_per_prompt": 2},
        "output": {"output_type": "np"},
    }
    for what, change in others.items():
        other = checked("text to image", **change)
        assert company(other) != company(one), what
        with pytest.raises(ValueError, match="cannot be joined"):
            join([one, other])
    assert company(checked("text to image", guidance_scale=7.0, prompt="b", seed=9)) == company(one)


def test_mixes_are_joined_and_keep_their_weights_and_noise(family):
    """Three mixes of two pictures: the labels of each are what it has alone, bit for bit."""
    pipe = family("variations")
    mixes = [
        {"image_embeds": np.random.default_rng(i).standard_normal((2, 16)), "image_weights": weights, "seed": i}
        for i, weights in enumerate(([1, 2], [3, -1], [0.5, 0.5]))
    ]
    alone = [checked("variations", image=None, mix_noise_level=40, **mix) for mix in mixes]
    # Three rows each, as the joined ones are, so that one program makes all.
    rows = [labels(pipe, join([request] * 3))[0] for request in alone]
    np.testing.assert_array_equal(labels(pipe, join(alone)), np.stack(rows))
    assert company(alone[0]) != company(checked("variations", image=None, image_embeds=np.zeros((1, 16))))


def labels(pipe, request):
    made = image_labels(pipe.parts, request.inputs.condition)[1](chunk_of(pipe.parts, request, np.arange(3)))
    return np.asarray(jax.device_get(made))
