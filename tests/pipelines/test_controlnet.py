"""ControlNets in every pipeline that takes them: what they add, when, and what is refused."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from tests import small_models
from tests.pipelines.small_controlnet import BASE, CONFIG, checkpoint
from tests.pipelines.small_family import HEIGHT, KINDS, WIDTH, arguments, one_level, open_pipeline, photo
from unclip_jax import ControlNet
from unclip_jax.distributed.mesh import local_mesh
from unclip_jax.models.configs import ControlNetConfig
from unclip_jax.pipelines.joined import company, join

TAKING = [name for name in KINDS if name != "upscaling"]


def controlnet(config=CONFIG, seed=5, devices=1, dtype="float32"):
    return ControlNet.from_checkpoint(checkpoint(config, seed), dtype, local_mesh(jax.local_devices()[:devices]))


@pytest.fixture(scope="module")
def net():
    return controlnet()


@pytest.fixture
def run(family, net):
    """A call of a kind with a ControlNet, with changes -> its latents."""

    def latents(name, **changes):
        given = {"controlnet": net, "control_image": photo(7), "controlnet_conditioning_scale": 1.0}
        return family(name)(**arguments(name, **{**given, **changes})).latents

    return latents


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


QUICK = ("text to image",)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.e2e) for n in TAKING])
def test_it_changes_the_image_by_its_hint_and_scale(name, run):
    without = run(name, controlnet=None, control_image=None)
    assert distance(run(name, controlnet_conditioning_scale=0.0), without) == 0
    whole, half, other = run(name), run(name, controlnet_conditioning_scale=0.5), run(name, control_image=photo(8))
    assert distance(whole, without) > 1e-2
    assert distance(half, whole) > 1e-3
    assert distance(other, whole) > 1e-3


def test_several_add_up(run, net):
    of_two = run(
        "text to image",
        controlnet=[net, net],
        control_image=[photo(7), photo(7)],
        controlnet_conditioning_scale=[0.25, 0.75],
    )
    assert distance(of_two, run("text to image")) < 1e-5


def test_it_is_run_in_its_window_alone(family, net, monkeypatch):
    """Windows count the steps that are run, as in diffusers: a step is outside if it begins before or ends after."""
    pipe = family("image to image")
    given = {"controlnet": net, "control_image": photo(7), "num_inference_steps": 10, "strength": 0.5}
    request = pipe.check(**arguments("image to image", **given, control_guidance_start=0.2, control_guidance_end=0.7))
    calls = request.solver.calls
    assert calls == 5
    assert [request.active_controls(call) for call in range(calls)] == [(), (0,), (0,), (), ()]
    seen = []
    program = pipe.programs.run_steps

    def recorded(*arrays, **static):
        *_, span, controls = arrays
        seen.append((*map(int, span), len(controls)))
        return program(*arrays, **static)

    monkeypatch.setattr(pipe, "programs", dataclasses.replace(pipe.programs, run_steps=recorded))
    pipe(**arguments("image to image", **given, control_guidance_start=0.2, control_guidance_end=0.7))
    assert seen == [(0, 1, 0), (1, 2, 1), (2, 3, 1), (3, 4, 0), (4, 5, 0)]


def test_a_stream_is_the_same_run(family, net):
    given = arguments("text to image", controlnet=net, control_image=photo(7), control_guidance_end=0.5)
    *_, last = family("text to image").stream(**{k: v for k, v in given.items() if k != "output_type"})
    np.testing.assert_array_equal(last.latents, family("text to image")(**given).latents)


@pytest.mark.e2e
def test_guess_mode_leaves_the_unconditional_rows_alone(run):
    """Without those rows it only grades the scale."""
    guessed = run("text to image", guess_mode=True)
    assert distance(guessed, run("text to image")) > 1e-3
    alone = {"guidance_scale": 1.0, "guidance_rescale": 0.0}
    assert distance(run("text to image", guess_mode=True, **alone), run("text to image", **alone)) > 1e-3


@pytest.mark.e2e
def test_an_image_does_not_depend_on_its_company(run, family_folder):
    hints = [photo(7), photo(8)]
    two = run("text to image", prompt=["a cat", "a dog"], control_image=hints, num_images_per_prompt=2)
    halves = run("text to image", prompt=["a cat", "a dog"], control_image=hints, num_images_per_prompt=2, batch_size=2)
    assert distance(halves, two) < 1e-5
    assert distance(run("text to image", num_images_per_prompt=2), two[:2]) < 1e-5
    pipe = open_pipeline(family_folder("TEXT_TO_IMAGE"), "TextToImagePipeline", 4)
    given = {"prompt": ["a cat", "a dog"], "control_image": hints, "num_images_per_prompt": 2}
    over_four = pipe(**arguments("text to image", **given, controlnet=controlnet(devices=4))).latents
    assert distance(over_four, two) < 1e-5


def test_requests_are_joined(family, net):
    pipe = family("text to image")
    requests = [
        pipe.check(**arguments("text to image", prompt=text, controlnet=net, control_image=photo(seed)))
        for text, seed in (("a cat", 7), ("a dog", 8))
    ]
    joined = join(requests).controls
    assert [array.shape for array in (*joined.hints, *joined.scales)] == [(2, HEIGHT, WIDTH, 3), (3, 2)]
    plain = pipe.check(**arguments("text to image"))
    other = pipe.check(**arguments("text to image", controlnet=controlnet(), control_image=photo(7)))
    assert len({company(request) for request in (*requests, plain, other)}) == 3


def test_a_hint_gives_the_size(family, net):
    given = {"height": None, "width": None, "controlnet": net, "control_image": photo(7, 16, 32)}
    assert family("text to image").check(**arguments("text to image", **given)).latent_shape == (8, 16, 4)


def changed(**changes):
    return dataclasses.replace(BASE, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control_image": None}, "control_image is missing"),
        ({"controlnet": None}, "control_image is given without a controlnet"),
        ({"controlnet": None, "control_image": None, "guess_mode": True}, "guess_mode is True without a controlnet"),
        ({"guess_mode": 1}, "guess_mode is 1"),
        ({"controlnet": "thibaud/controlnet"}, "want a ControlNet, from ControlNet.from_pretrained"),
        ({"control_image": photo(7, 16, 16)}, "control_image is 16x16 and the image is 24x20; want the same"),
        ({"control_image": np.zeros((HEIGHT, WIDTH, 2), np.uint8)}, "2"),
        ({"control_image": [photo(7)] * 3}, "control_image has 3 images; want one, or 1"),
        ({"control_image": []}, "empty list"),
        ({"controlnet_conditioning_scale": "1"}, "controlnet_conditioning_scale is '1'"),
        ({"controlnet_conditioning_scale": [1.0]}, "controlnet_conditioning_scale has 1 values"),
        ({"control_guidance_start": 0.5, "control_guidance_end": 0.5}, "want start before end"),
        ({"control_guidance_end": 1.5}, "control_guidance_end is 1.5; want a number from 0 to 1"),
    ],
)
def test_what_does_not_fit_is_refused(family, net, changes, message):
    given = {"controlnet": net, "control_image": photo(7), **changes}
    with pytest.raises(ValueError, match=message):
        family("text to image").check(**arguments("text to image", **given))


def test_lists_have_one_of_each(family, net):
    check = functools.partial(family("text to image").check, controlnet=[net, net])
    two = [photo(7), photo(8)]
    with pytest.raises(ValueError, match="control_image is not a list of 2"):
        check(**arguments("text to image", control_image=photo(7)))
    with pytest.raises(ValueError, match="control_guidance_start has 3 values; want one for each ControlNet, 2"):
        check(**arguments("text to image", control_image=two, control_guidance_start=[0.0, 0.1, 0.2]))
    with pytest.raises(ValueError, match="empty list"):
        family("text to image").check(**arguments("text to image", controlnet=[], control_image=[]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ControlNetConfig(changed(cross_attention_dim=24), 3, (8, 16)), "a text width of 24; this checkpoint needs 32"),
        (ControlNetConfig(changed(block_out_channels=(64,)), 3, (8, 16)), r"block_out_channels \(64,\)"),
        (ControlNetConfig(BASE, 3, (8, 16, 16)), "pixels a latent 4; this checkpoint needs 2"),
        (ControlNetConfig(one_level(small_models.SMALL).unet, 3, (8, 16)), "class labels 32; this checkpoint needs 0"),
    ],
)
def test_one_for_another_base_is_refused(family, config, message):
    with pytest.raises(ValueError, match=message):
        family("text to image").check(
            **arguments("text to image", controlnet=controlnet(config), control_image=photo())
        )


def test_one_elsewhere_is_refused(family):
    for other in (controlnet(devices=2), controlnet(dtype="bfloat16")):
        with pytest.raises(ValueError, match="on other devices or in another dtype than the pipeline"):
            family("text to image").check(**arguments("text to image", controlnet=other, control_image=photo()))


@pytest.mark.e2e
def test_one_with_labels_reads_them(family):
    """A ControlNet trained beside an unCLIP checkpoint is conditioned by the image, too."""
    config = ControlNetConfig(one_level(small_models.SMALL).unet, 3, (8, 16))
    given = {"controlnet": controlnet(config), "control_image": photo(7)}
    first, second = (family("variations")(**arguments("variations", **given, image=photo(n))).latents for n in (0, 1))
    assert distance(first, second) > 1e-3
