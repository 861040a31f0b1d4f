"""What all pipelines promise: an image is its seed's, index's and inputs' alone; scalars compile nothing; streams."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

import unclip_jax
from convert.__main__ import main as convert
from convert.export.diffusers import save_diffusers
from tests.pipelines.small_family import (
    HEIGHT,
    KINDS,
    STEPS,
    WIDTH,
    Compilations,
    arguments,
    hole,
    open_pipeline,
    photo,
)
from unclip_jax.checkpoints.source import open_checkpoint
from unclip_jax.pipelines.depth_to_image import depth_channel

# Two have nothing that another has not: they are run by the live comparisons alone.
RUN = [name for name in KINDS if name not in ("image to image", "inpainting, four channels")]
EVERY = pytest.mark.parametrize("name", RUN)
BEGINNING = ["image to image", "variation of latents", "depth", "inpainting", "inpainting, four channels"]
PAINTING = [name for name in RUN if name.startswith("inpainting")]
TWO_IMAGES = [photo(), photo(1)]


@pytest.fixture
def run(family):
    """A good call of a kind, with changes -> what the pipeline gives."""
    return lambda name, **changes: family(name)(**arguments(name, **changes))


def assert_close(got, want, tolerance=1e-5):
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


def assert_differ(*pictures):
    for i, a in enumerate(pictures):
        for b in pictures[:i]:
            assert np.linalg.norm(a - b) > 1e-3 * np.linalg.norm(b)


@pytest.mark.e2e
@EVERY
def test_an_image_does_not_depend_on_what_is_made_beside_it(name, run):
    two = run(name, num_images_per_prompt=2).latents
    alone = run(name).latents
    assert_close(alone, two[:1])
    assert_close(run(name, num_images_per_prompt=2, batch_size=1).latents, two)
    beside = {"image": TWO_IMAGES} if "image" in KINDS[name].settings else {"prompt": ["a cat", "two dogs"]}
    if "condition_image" in KINDS[name].settings:
        beside["condition_image"] = TWO_IMAGES
        alone = run(name, condition_image=photo()).latents
    pair = run(name, **beside).latents
    assert_close(pair[:1], alone)
    others = [run(name, prompt="two dogs", **extra).latents for extra in ({}, {"seed": 9})]
    assert_differ(two[0], two[1], pair[1], *(other[0] for other in others))


@pytest.mark.parametrize("name", ["inpainting by a picture", "variations"])
def test_an_image_does_not_depend_on_the_devices(name, run, family_folder):
    """Three images on four devices, at once and by two: padded, and trimmed.

    Of the pipeline with the most inputs, by programs of one step; and of one whose loop is one program.
    """
    kind = KINDS[name]
    spread = open_pipeline(family_folder(kind.model), kind.pipeline, devices=4)
    whole = run(name, num_images_per_prompt=3, batch_size=1).latents
    for batch_size in (None, 2):
        assert_close(spread(**arguments(name, num_images_per_prompt=3, batch_size=batch_size)).latents, whole)


@EVERY
def test_scalars_compile_nothing(name, run, family):
    settings, calls = arguments(name), family(name).check(**arguments(name)).solver.calls
    changes = [{"guidance_scale": 3.3}, {"guidance_scale": np.linspace(1.5, 3.5, calls)}, {"eta": 0.25}]
    changes += [{"seed": 2**32 - 1}, {"prompt": "something else", "negative_prompt": "blurry"}]
    others = {
        "guidance_rescale": 0.9,
        "image_guidance_scale": 2.5,
        "pag_scale": 0.5,
        "projected_guidance": unclip_jax.ProjectedGuidance(0.2, 3.0, -0.5),
        "guidance_interval": (0.5, 1.0),
        "noise_level": 333,
        "image": photo(5),
        "mask_image": np.roll(hole(), 4),
        "condition_image": photo(6),
    }
    changes += [{key: value} for key, value in others.items() if key in settings]
    changes += [{"strength": 0.7, "seed": 4}] if name in BEGINNING[:3] else []  # as many steps as 0.8
    run(name)
    with Compilations() as compiled:
        made = [run(name, **change).latents for change in changes]
    assert compiled.count == 0
    assert all(np.isfinite(latents).all() for latents in made)
    assert_differ(run(name).latents, *made)


def test_the_count_of_programs_counts():
    with Compilations() as compiled:
        jax.jit(lambda x: 3 * x)(1.0)
    assert compiled.count > 0


@EVERY
def test_a_stream_is_the_same_run_and_can_be_closed(name, family, run):
    whole = run(name).latents
    settings = {key: value for key, value in arguments(name).items() if key != "output_type"}
    states = list(family(name).stream(**settings))
    assert [state.step for state in states] == [*range(1, states[0].num_steps + 1)]
    np.testing.assert_array_equal(states[-1].latents, whole)
    height, width = whole.shape[1:3]
    assert [preview.size for preview in states[0].preview()] == [(width, height)]
    if "upscaling" in name:
        assert [picture.size for picture in states[0].decode()] == [(2 * width, 2 * height)]
    stream = family(name).stream(**settings)
    next(stream)
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)
    np.testing.assert_array_equal(run(name).latents, whole)


@EVERY
def test_output_types_of_constant_images_are_finite_and_agree(name, run):
    """Of a flat image neither a depth map nor anything else is NaN."""
    flat = {"image": np.full((HEIGHT, WIDTH, 3), 127, np.uint8)} if "image" in KINDS[name].settings else {}
    arrays, pictures = (run(name, output_type=kind, **flat) for kind in ("np", "pil"))
    assert np.isfinite(arrays.images).all()
    factor = 2 if name == "upscaling" else 1  # the tiny VAE's; the published one's is 4
    assert arrays.images.shape == (1, factor * HEIGHT, factor * WIDTH, 3)
    assert arrays.images.dtype == np.float32
    np.testing.assert_array_equal(np.asarray(pictures.images[0]), np.rint(arrays.images[0] * 255).astype(np.uint8))
    assert arrays.nsfw_content_detected is None
    assert (arrays.image_embeds is None) == (KINDS[name].model != "SMALL")


@pytest.mark.parametrize("name", [name for name in RUN if "image" in KINDS[name].settings and name != "variations"])
def test_prompts_and_images_pair_or_one_is_for_all(name, run, family):
    """Several prompts for one image; one an image; other numbers, and images of several sizes, are refused."""
    prompts = ["a cat", "two dogs"]
    alone = run(name).latents
    for image in (photo(), [photo()]):
        both = run(name, image=image, prompt=prompts).latents
        assert_close(both[:1], alone)
    pair = run(name, image=TWO_IMAGES, prompt=prompts).latents
    assert_close(pair[:1], alone)
    assert_differ(both[1], pair[1])
    with pytest.raises(ValueError, match="prompt has 3 strings; there are 2 images"):
        run(name, image=TWO_IMAGES, prompt=["a", "b", "c"])
    several = [photo(), photo(1, 32, 28)]
    with pytest.raises(ValueError, match="image: the images are of several sizes"):
        run(name, image=several)
    if name != "upscaling":
        height, width = 16, 20
        inputs = family(name).check(**arguments(name, image=several, height=height, width=width)).inputs
        assert getattr(inputs, "init", inputs).pixels.shape == (2, height, width, 3)


@pytest.mark.parametrize("name", BEGINNING)
def test_strength_says_how_many_steps_are_made(name, family, run):
    """1 makes every step and forgets the image's latents; the least that is taken makes one and keeps them."""
    pipe = family(name)
    whole = pipe.check(**arguments(name, strength=1.0))
    assert whole.solver.calls == STEPS
    assert pipe.check(**arguments(name, strength=np.float32(0.7))).solver.calls == 2
    assert pipe.check(**arguments(name, strength=0.34)).solver.calls == 1
    if name == "variation of latents":
        near, far = (run(name, strength=strength).latents for strength in (0.34, 0.8))
        encoded = pipe.vae_encode(pipe.check(**arguments(name, strength=0.5)).inputs.init.pixels)[..., :4]
        encoded *= pipe.config.vae.scaling_factor
        assert np.linalg.norm(near - encoded) < np.linalg.norm(far - encoded)


@pytest.mark.parametrize("name", PAINTING)
def test_what_is_black_in_the_mask_is_kept(name, run, family):
    """In images bit for bit, of their own size; with models of four channels in the latents, too."""
    picture = photo(2, 34, 46)  # of no size that the networks take
    mask = hole(34, 46)
    for way in ({"paste_back": True}, {"padding_mask_crop": 3}):
        settings = {"image": picture, "mask_image": mask, "height": HEIGHT, "width": WIDTH, "output_type": "pil"}
        made = np.asarray(run(name, **settings, **way).images[0])
        assert made.shape == picture.shape
        np.testing.assert_array_equal(made[mask == 0], picture[mask == 0])
        assert (made[mask == 255] != picture[mask == 255]).mean() > 0.5
    if name != "inpainting":
        pipe = family(name)
        made = run(name, sample_posterior=False).latents
        request = pipe.check(**arguments(name))
        encoded = pipe.vae_encode(request.inputs.init.pixels)[..., :4] * pipe.config.vae.scaling_factor
        outside = np.broadcast_to(request.inputs.mask == 0, made.shape)
        assert 0.5 < outside.mean() < 1
        np.testing.assert_allclose(made[outside], encoded[outside], rtol=0, atol=1e-5)


def test_a_hole_is_filled_by_an_image(run, family):
    name = "inpainting by a picture"
    inside = family(name).check(**arguments(name)).inputs.mask[0, ..., 0] == 1
    own, other = (run(name, condition_image=picture).latents[0][inside] for picture in (None, photo(9)))
    assert_differ(own, other)
    embeds = family(name).encode_image_embeds([photo(9)])
    given = run(name, condition_image=None, image_embeds=embeds).latents[0][inside]
    assert_close(given, other)
    both = run(name, condition_image=None, image_embeds=embeds, prompt=["a cat", "two dogs"])
    assert_close(both.latents[0][inside], other)  # one for all
    with pytest.raises(ValueError, match="condition_image and image_embeds"):
        run(name, image_embeds=embeds)


def test_a_given_depth_map_replaces_the_estimators(run, family):
    """A given one takes the place of the estimator's, whatever its form, size and range."""
    pipe, own = family("depth"), run("depth").latents
    view = pipe.check(**arguments("depth")).inputs.views[0]
    estimated = np.asarray(pipe.programs.estimate_depth(pipe.networks["depth_estimator"].params, view))[0]
    assert_close(run("depth", depth_map=3 * estimated - 7).latents, own, 1e-4)
    slope = np.linspace(0, 255, 24 * 20).reshape(20, 24).astype(np.uint8)
    forms = [slope, Image.fromarray(slope), [slope], slope[..., None].astype(float)]
    made = [run("depth", depth_map=depth).latents for depth in forms]
    for other in made[1:]:
        np.testing.assert_array_equal(other, made[0])
    assert_differ(own, made[0], run("depth", depth_map=slope[::-1]).latents)
    pair = run("depth", image=TWO_IMAGES, depth_map=[slope, slope[::-1]]).latents
    assert_close(pair[:1], made[0])
    assert_differ(pair[1], run("depth", image=TWO_IMAGES, depth_map=slope).latents[1])


def test_constant_depth_maps_say_nothing(run, family, monkeypatch):
    """Given or estimated, they say nothing: one image, that of the depth -1 everywhere."""
    pipe, own = family("depth"), run("depth").latents
    flat = [np.zeros((20, 24)), np.full((7, 5), 3.3), np.full((20, 24), 200, np.uint8), Image.new("L", (24, 20), 9)]
    made = [run("depth", depth_map=depth).latents for depth in flat]
    estimator = pipe.networks["depth_estimator"]
    blind = dataclasses.replace(estimator, params={name: 0 * array for name, array in estimator.params.items()})
    monkeypatch.setitem(pipe.networks, "depth_estimator", blind)
    made.append(run("depth").latents)
    for latents in made:
        np.testing.assert_array_equal(latents, made[0])
    assert np.isfinite(made[0]).all()
    assert_differ(own, made[0])
    asked = pipe.check(**arguments("depth"))
    np.testing.assert_array_equal(depth_channel(pipe.parts, asked), np.full((1, *asked.latent_shape[:2], 1), -1))
    (picture,) = run("depth", depth_map=flat[0], output_type="pil").images
    assert picture.size == (WIDTH, HEIGHT)


def test_the_upscalers_noise_level_is_each_images_own(run):
    low, high = (run("upscaling", noise_level=level).latents for level in (0, 350))
    assert_differ(low, high)
    pair = run("upscaling", prompt=["a cat", "a cat"], noise_level=[0, 350]).latents
    assert_close(pair[:1], low)
    assert np.isfinite(high).all()


CLASSES = {
    "SMALL": "UnCLIPPipeline",
    "TEXT_TO_IMAGE": "TextToImagePipeline",
    "DEPTH": "DepthToImagePipeline",
    "INPAINT": "InpaintPipeline",
    "UPSCALE": "UpscalePipeline",
    "INSTRUCT": "InstructPipeline",
}


@pytest.mark.parametrize("model", CLASSES)
def test_the_right_pipeline_is_opened_and_others_are_refused(model, family_folder):
    folder = family_folder(model)
    assert type(unclip_jax.from_pretrained(folder)) is getattr(unclip_jax, CLASSES[model])
    takes = {CLASSES[model]} | {kind.pipeline for kind in KINDS.values() if kind.model == model}
    for name in {*CLASSES.values(), "ImageToImagePipeline"} - takes:
        with pytest.raises(ValueError, match=f"is a checkpoint for .*; {name} takes one for ") as caught:
            getattr(unclip_jax, name).from_pretrained(folder)
        assert "\n" not in str(caught.value)


def test_a_converted_directory_makes_the_same_images(family_folder, run, tmp_path):
    """From our directory to diffusers' folder and back, and with networks that are read for their stage alone."""
    with open_checkpoint(family_folder("DEPTH")) as checkpoint:
        save_diffusers(checkpoint, tmp_path / "folder")
    assert convert([str(tmp_path / "folder"), str(tmp_path / "back")]) == 0
    want = run("depth").latents
    pipe = open_pipeline(tmp_path / "back", "DepthToImagePipeline", memory=unclip_jax.Memory(free_networks=True))
    np.testing.assert_array_equal(pipe(**arguments("depth")).latents, want)
