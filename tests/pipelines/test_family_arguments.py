"""Every bad argument of the family's pipelines is refused in one line that names it, before anything is compiled."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

import unclip_jax
from tests import small_models
from tests.pipelines.small_family import KINDS, Compilations, arguments, hole, photo, task_of
from unclip_jax.models.freeu import FreeU
from unclip_jax.sampling import make_solver

LATENTS = (1, 10, 12, 4)
BLACK = np.zeros((20, 24), np.uint8)
D = 16  # of the image embeddings


def zeros(*shape):
    return np.zeros(shape, np.float32)


# By the kinds that have them: changes to a good call, and words of the message.
BEGINNING = [
    ({"strength": 0}, ["strength", "0"]),
    ({"strength": -1}, ["strength", "-1"]),
    ({"strength": 1.5}, ["strength", "1.5"]),
    ({"strength": "x"}, ["strength", "'x'"]),
    ({"strength": True}, ["strength", "True"]),
    ({"strength": float("nan")}, ["strength", "nan"]),
    ({"strength": 0.3}, ["strength is 0.3", "num_inference_steps 3", "no step"]),
    ({"strength": 0.7, "scheduler": "ldm-dpm"}, ["'ldm-dpm'", "image"]),
    ({"strength": 0.7, "noise": zeros(2, 10, 12, 4)}, ["noise", "(2, 10, 12, 4)", str(LATENTS)]),
    ({"strength": 0.7, "noise": np.full(LATENTS, np.nan)}, ["noise", "NaN"]),
    ({"posterior_noise": zeros(1, 3)}, ["posterior_noise", "(1, 3)"]),
    ({"posterior_noise": zeros(*LATENTS), "sample_posterior": False}, ["posterior_noise", "sample_posterior"]),
    ({"sample_posterior": 1}, ["sample_posterior", "1"]),
    ({"image": None}, ["image", "missing"]),
    ({"image": []}, ["image", "empty"]),
    ({"image": photo(0, 1, 24)}, ["image", "24x1", "at least 2"]),
    ({"image": np.full((20, 24, 3), 2.0)}, ["image", "2"]),
    ({"image": "no/such.png"}, ["no/such.png"]),
    ({"height": 21}, ["height", "21", "multiple of 2"]),
    ({"prompt": ["a", "b"], "image": [photo()] * 3}, ["prompt", "2 strings", "3 images"]),
    ({"prompt": []}, ["prompt", "0 strings"]),
    ({"prompt_embeds": zeros(3, 16, 32)}, ["prompt_embeds", "(3, 16, 32)"]),
]
ALL = [
    ({"guidance_rescale": 1.1}, ["guidance_rescale", "1.1"]),
    ({"guidance_rescale": "x"}, ["guidance_rescale", "'x'"]),
    ({"guidance_rescale": float("nan")}, ["guidance_rescale", "nan"]),
    ({"guidance_interval": 3}, ["guidance_interval", "3"]),
    ({"guidance_interval": (1, 2, 3)}, ["guidance_interval", "(1, 2, 3)"]),
    ({"guidance_interval": (-1, 2)}, ["guidance_interval", "-1"]),
    ({"guidance_interval": (2, 1)}, ["guidance_interval", "(2, 1)"]),
    ({"pag_scale": -1}, ["pag_scale", "-1"]),
    ({"pag_scale": float("inf")}, ["pag_scale", "inf"]),
    ({"pag_scale": None}, ["pag_scale", "None"]),
    ({"projected_guidance": 0.5}, ["projected_guidance", "0.5"]),
    ({"scheduler": "eulr-a"}, ["eulr-a", "did you mean 'euler-a'"]),
    ({"step_noise": zeros(1, 2)}, ["step_noise", "(1, 2)"]),
    ({"negative_prompt": ["a", "b"]}, ["negative_prompt", "2 strings"]),
    ({"batch_size": 0}, ["batch_size", "0"]),
    ({"output_type": "jpeg"}, ["output_type", "jpeg"]),
]
NOT_UNCLIP = [
    ({"image_embeds": zeros(1, D)}, ["image_embeds", "not an unCLIP"]),
    ({"image_noise": zeros(1, D)}, ["image_noise", "not an unCLIP"]),
    ({"noise_level": 3}, ["noise_level", "not an unCLIP"]),
    ({"noise_level": "x"}, ["noise_level", "not an unCLIP"]),
]
UNCLIP = [
    ({"image_noise": zeros(2, D)}, ["image_noise", f"(2, {D})"]),
    ({"noise_level": 1001}, ["noise_level", "1001"]),
]
PAINTING = [
    ({"mask_image": None}, ["mask_image", "missing"]),
    ({"mask_image": BLACK}, ["mask_image", "nothing white"]),
    ({"mask_image": hole().astype(np.int32)}, ["mask_image", "int32"]),
    ({"mask_image": np.zeros((20, 24, 2), np.uint8)}, ["mask_image", "(20, 24, 2)"]),
    ({"mask_image": np.zeros((0, 4), np.uint8)}, ["mask_image", "(0, 4)"]),
    ({"mask_image": np.full((20, 24), np.nan)}, ["mask_image", "NaN"]),
    ({"mask_image": [hole()] * 2}, ["mask_image", "2 masks", "1 images"]),
    ({"mask_image": "no/such.png"}, ["no/such.png"]),
    ({"mask_image": hole(10, 12), "paste_back": True, "output_type": "pil"}, ["mask_image", "12x10", "24x20"]),
    ({"mask_image": hole(10, 12), "padding_mask_crop": 3, "output_type": "pil"}, ["mask_image", "12x10", "24x20"]),
    ({"mask_image": hole(10, 12), "scheduler": "ldm-ddim", "num_inference_steps": 4}, ["mask_image", "12x10", "24x20"]),
    ({"padding_mask_crop": -1, "output_type": "pil"}, ["padding_mask_crop", "-1"]),
    ({"padding_mask_crop": 2.5, "output_type": "pil"}, ["padding_mask_crop", "2.5"]),
    ({"padding_mask_crop": 3, "output_type": "np"}, ["output_type", "'np'", "pasted back"]),
    ({"padding_mask_crop": 3, "output_type": "pil", "mask_image": BLACK}, ["mask_image", "nothing white"]),
    ({"padding_mask_crop": 3, "output_type": "pil", "height": 21}, ["height", "21"]),
    ({"paste_back": 1}, ["paste_back", "1"]),
    ({"paste_back": True, "output_type": "latent"}, ["output_type", "'latent'", "pasted back"]),
    ({"noise": zeros(*LATENTS)}, ["noise is given", "strength 1", "'latents'"]),
    ({"posterior_noise": zeros(2, *LATENTS)}, ["posterior_noise", f"(2, {str(LATENTS)[1:]}; want {LATENTS}"]),
    ({"strength": 0.7, "latents": zeros(*LATENTS)}, ["latents is given", "strength 0.7", "'noise'"]),
    ({"latents": zeros(1, 2, 2, 4)}, ["latents", "(1, 2, 2, 4)"]),
]
BY_KIND = {
    "text to image": [
        ({"latents": zeros(1, 2, 2, 4)}, ["latents", "(1, 2, 2, 4)"]),
        ({"prompt": []}, ["prompt", "empty"]),
        ({"prompt": 3}, ["prompt", "3"]),
        ({"width": 9}, ["width", "9", "multiple of 2"]),
        ({"prompt_embeds": zeros(1, 3, 3)}, ["prompt_embeds", "(1, 3, 3)"]),
    ],
    "image to image": [*ALL, *BEGINNING, *NOT_UNCLIP],
    "variation of latents": [
        *UNCLIP,
        ({"image_embeds": zeros(3, D)}, ["image_embeds", "3", "want 1"]),
        ({"image_embeds": zeros(1, 7)}, ["image_embeds", "(1, 7)"]),
    ],
    "depth": [
        ({"depth_map": photo()}, ["depth_map", "(20, 24, 3)"]),
        ({"depth_map": np.full((20, 24), np.inf)}, ["depth_map", "infinite"]),
        ({"depth_map": [hole()] * 2}, ["depth_map", "2 maps", "1 images"]),
        ({"depth_map": "x.png"}, ["x.png"]),
        ({"depth_map": Image.fromarray(photo())}, ["depth_map", "colour"]),
        ({"depth_map": 3}, ["depth_map", "int"]),
        ({"scheduler": "ldm-ddim", "num_inference_steps": 1}, ["num_inference_steps", "1"]),
    ],
    "inpainting": PAINTING,
    "inpainting, four channels": [
        *NOT_UNCLIP,
        ({"condition_image": photo()}, ["condition_image", "not an unCLIP"]),
    ],
    "inpainting by a picture": [
        *UNCLIP,
        ({"image_embeds": zeros(1, D)}, ["condition_image and image_embeds", "not both"]),
        ({"condition_image": [photo()] * 2}, ["condition_image", "2", "want 1"]),
        ({"condition_image": 3}, ["condition_image", "int"]),
    ],
    "upscaling": [
        ({"noise_level": 351}, ["noise_level", "351", "350"]),
        ({"noise_level": -1}, ["noise_level", "-1"]),
        ({"noise_level": 1.5}, ["noise_level", "1.5"]),
        ({"noise_level": [1, 2]}, ["noise_level", "2 values", "1 images"]),
        ({"low_res_noise": zeros(1, 10, 12, 3)}, ["low_res_noise", "(1, 10, 12, 3)", "(1, 20, 24, 3)"]),
        ({"latents": zeros(*LATENTS)}, ["latents", str(LATENTS), "(1, 20, 24, 4)"]),
        ({"image": None}, ["image", "missing"]),
        ({"image": [photo(), photo(0, 8, 8)]}, ["image", "several sizes"]),
    ],
    "instruction": [
        ({"image_guidance_scale": "x"}, ["image_guidance_scale", "'x'"]),
        ({"image_guidance_scale": None}, ["image_guidance_scale", "None"]),
        ({"image_guidance_scale": True}, ["image_guidance_scale", "True"]),
        ({"image_guidance_scale": float("nan")}, ["image_guidance_scale", "nan"]),
        ({"image_guidance_scale": [1, 2]}, ["image_guidance_scale", "(2,)", "(3,)"]),
        ({"image_guidance_scale": [1, 2, np.inf]}, ["image_guidance_scale", "infinite"]),
        ({"guidance_scale": "x"}, ["guidance_scale", "'x'"]),
        ({"projected_guidance": unclip_jax.ProjectedGuidance()}, ["projected_guidance", "image_guidance_scale"]),
        ({"latents": zeros(1, 2, 2, 4)}, ["latents", "(1, 2, 2, 4)", str(LATENTS)]),
        ({"image": None}, ["image", "missing"]),
        ({"image": photo(0, 1, 24)}, ["image", "24x1", "at least 2"]),
        ({"height": 21}, ["height", "21", "multiple of 2"]),
        ({"prompt": ["a", "b"], "image": [photo()] * 3}, ["prompt", "2 strings", "3 images"]),
    ],
}
BAD = [(name, change, words) for name, cases in BY_KIND.items() for change, words in cases]


@pytest.mark.parametrize(
    ("name", "change", "words"), BAD, ids=[f"{i}-{'-'.join(c)}" for i, (_, c, _) in enumerate(BAD)]
)
def test_bad_arguments(name, change, words):
    """By the configuration and the arguments alone: there is no network."""
    task, config = task_of(name)
    with Compilations() as compiled, pytest.raises((ValueError, FileNotFoundError)) as caught:
        task.check(config, task.arguments(**arguments(name, **change)))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    assert compiled.count == 0


@pytest.mark.parametrize("name", KINDS)
def test_calls_and_streams_check_their_arguments_before_anything_is_compiled(name, family):
    pipe = family(name)
    with Compilations() as compiled:
        for make in (pipe, pipe.stream, pipe.check):
            with pytest.raises(ValueError, match="seed is -1"):
                make(**arguments(name, seed=-1))
        with pytest.raises(ValueError, match="batch_size has no meaning for stream"):
            pipe.stream(**arguments(name, batch_size=1))
        with pytest.raises(TypeError, match="guidance"):
            pipe.stream(**arguments(name, guidance=3))
    assert compiled.count == 0


SOLVED = make_solver("ddim", small_models.TEXT_TO_IMAGE.scheduler_config, 20, eta=0.5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_inference_steps": 30}, "num_inference_steps is 30, but scheduler is a Solver of 20"),
        ({"num_inference_steps": 50}, "num_inference_steps is 50, but scheduler is a Solver of 20"),
        ({"eta": 0.0}, r"eta is 0\.0, but scheduler is a Solver"),
        ({"strength": 0.04}, "leaves no step"),
    ],
)
def test_what_a_solver_cannot_honour_is_refused(change, words):
    task, config = task_of("image to image")
    with pytest.raises(ValueError, match=words):
        task.check(config, task.arguments(image=photo(), scheduler=SOLVED, **change))


@pytest.mark.parametrize("name", ["image to image", "depth", "inpainting"])
@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "dpm++2m-karras", "heun", "euler-a"])
def test_a_solver_is_cut_at_the_strength(name, scheduler):
    """As the solver of that name is, grid and start alike; and one that is cut already is taken as it is."""
    task, config = task_of(name)
    whole = make_solver(scheduler, config.scheduler_config, 20)

    def solver(**change):
        return task.check(config, task.arguments(**{**KINDS[name].settings, **change})).solver

    for strength in (0.1, 0.55, 0.9):
        cut = solver(scheduler=whole, strength=strength)
        named = solver(scheduler=scheduler, strength=strength, num_inference_steps=20)
        assert cut.calls == named.calls < whole.calls
        assert cut.start_alpha_cumprod == named.start_alpha_cumprod
        for column in named.grid:
            np.testing.assert_array_equal(cut.grid[column], named.grid[column])
    with pytest.raises(ValueError, match=r"leaves out \d+ steps already"):
        solver(scheduler=cut, strength=0.5)
    if name != "inpainting":  # whose strength is 1 where none is given
        assert solver(scheduler=cut) is cut


def test_a_solver_of_ones_own_is_cut_where_it_remembers_nothing():
    task, config = task_of("image to image")
    named = {n: dataclasses.replace(make_solver(n, config.scheduler_config, 10), recipe=None) for n in ("ddim", "lms")}
    cut = task.check(config, task.arguments(image=photo(), scheduler=named["ddim"], strength=0.3)).solver
    want = make_solver("ddim", config.scheduler_config, 10, start_step=7)
    assert cut.start_alpha_cumprod == want.start_alpha_cumprod
    for column in want.grid:
        np.testing.assert_array_equal(cut.grid[column], want.grid[column])
    with pytest.raises(ValueError, match="remembers earlier steps"):
        task.check(config, task.arguments(image=photo(), scheduler=named["lms"], strength=0.3))


def test_the_solver_says_whose_procedure_is_followed():
    """By name or as an object alike: the filter by which images are resized, and when guidance is off."""
    task, config = task_of("depth")
    given = {"image": photo(0, 40, 50), "height": 20, "width": 24, "depth_map": hole()}
    named = [
        task.check(config, task.arguments(**given, scheduler=scheduler, num_inference_steps=20, guidance_scale=0.5))
        for scheduler in ("ldm-ddim", make_solver("ldm-ddim", config.scheduler_config, 20), "ddim")
    ]
    assert [request.guidance.unconditional for request in named] == [True, True, False]
    pixels = [request.inputs.init.pixels for request in named]
    np.testing.assert_array_equal(pixels[0], pixels[1])
    assert np.abs(pixels[0] - pixels[2]).max() > 1e-3


@pytest.mark.parametrize("changes", [{"eta": -0.1}, {"eta": 1.1}, {"threshold": 0}, {"momentum": 2}])
def test_projected_guidance(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        unclip_jax.ProjectedGuidance(**changes)


def test_freeu_marks_and_adapters_that_there_are_not(family):
    pipe = family("text to image")
    for name, numbers in {"s1": (-1, 1, 1, 1), "b2": (1, 1, 1, float("nan")), "s2": (1, "x", 1, 1)}.items():
        with pytest.raises(ValueError, match=f"^{name} is "):
            pipe.freeu = FreeU(*numbers)
    assert pipe.freeu is None
    with pytest.raises(ValueError, match=r"adapter_names has 'mine'; loaded: none"):
        pipe.set_adapters("mine")
    with Compilations() as compiled, pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe, "watermark", b"SDV2")
        with pytest.raises(ValueError, match=r"output_type is 'np'; a watermark or a safety checker needs 'pil'"):
            pipe(**arguments("text to image", output_type="np"))
        with pytest.raises(ValueError, match=r"images of 24x20 are too small for a watermark; want 65536 pixels"):
            pipe.check(**arguments("text to image", output_type="pil"))
    assert compiled.count == 0


def test_a_watermark_on_what_is_pasted_back(family):
    """It is the finished image whose size counts."""
    pipe = family("inpainting")
    large = {"image": photo(0, 256, 256), "mask_image": hole(256, 256), "height": 20, "width": 24}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe, "watermark", b"SDV2")
        pipe.check(**arguments("inpainting", output_type="pil", padding_mask_crop=8, **large))
        with pytest.raises(ValueError, match="24x20 are too small"):
            pipe.check(**arguments("inpainting", output_type="pil", **large))
        with pytest.raises(ValueError, match="24x20 are too small"):
            pipe.check(**arguments("inpainting", output_type="pil", paste_back=True, height=256, width=256))
