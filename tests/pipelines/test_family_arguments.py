"""Every bad argument of the family's pipelines is refused in one line that names it, before anything is compiled."""

import numpy as np
import pytest
from PIL import Image

import unclip_jax
from tests.pipelines.small_family import Compilations, arguments, hole, photo

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
    ({"prompt": ["a", "b"], "image": [photo()] * 3}, ["prompt", "2 strings", "3 pictures"]),
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
    ({"mask_image": [hole()] * 2}, ["mask_image", "2 masks", "1 pictures"]),
    ({"mask_image": "no/such.png"}, ["no/such.png"]),
    ({"mask_image": hole(10, 12), "paste_back": True, "output_type": "pil"}, ["mask_image", "12x10", "24x20"]),
    ({"mask_image": hole(10, 12), "padding_mask_crop": 3, "output_type": "pil"}, ["mask_image", "12x10", "24x20"]),
    ({"mask_image": hole(10, 12), "scheduler": "ldm-ddim"}, ["mask_image", "12x10", "24x20"]),
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
        ({"depth_map": [hole()] * 2}, ["depth_map", "2 maps", "1 pictures"]),
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
}
BAD = [(name, change, words) for name, cases in BY_KIND.items() for change, words in cases]


@pytest.mark.parametrize(
    ("name", "change", "words"), BAD, ids=[f"{i}-{'-'.join(c)}" for i, (_, c, _) in enumerate(BAD)]
)
def test_bad_arguments(name, change, words, family):
    pipe = family(name)
    with Compilations() as compiled:
        for call in (pipe, pipe.stream):
            if "batch_size" in change and call is not pipe:
                continue
            with pytest.raises((ValueError, FileNotFoundError)) as caught:
                call(**arguments(name, **change))
            message = str(caught.value)
            assert "\n" not in message
            for word in words:
                assert word in message, message
    assert compiled.count == 0


@pytest.mark.parametrize("changes", [{"eta": -0.1}, {"eta": 1.1}, {"threshold": 0}, {"momentum": 2}])
def test_projected_guidance(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        unclip_jax.ProjectedGuidance(**changes)


def test_freeu_marks_and_adapters_that_there_are_not(family):
    pipe = family("text to image")
    for name, numbers in {"s1": (-1, 1, 1, 1), "b2": (1, 1, 1, float("nan")), "s2": (1, "x", 1, 1)}.items():
        with pytest.raises(ValueError, match=f"^{name} is "):
            pipe.enable_freeu(*numbers)
    assert pipe.freeu is None
    with pytest.raises(ValueError, match=r"adapter_names has 'mine'; loaded: none"):
        pipe.set_adapters("mine")
    with Compilations() as compiled, pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe, "watermark", b"SDV2")
        with pytest.raises(ValueError, match=r"output_type is 'np'; a watermark or a safety checker needs 'pil'"):
            pipe(**arguments("text to image", output_type="np"))
        with pytest.raises(ValueError, match=r"pictures of 24x20 are too small for a watermark; want 65536 pixels"):
            pipe.check(**arguments("text to image", output_type="pil"))
    assert compiled.count == 0


def test_a_watermark_on_what_is_pasted_back(family):
    """It is the finished picture whose size counts."""
    pipe = family("inpainting")
    large = {"image": photo(0, 256, 256), "mask_image": hole(256, 256), "height": 20, "width": 24}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe, "watermark", b"SDV2")
        pipe.check(**arguments("inpainting", output_type="pil", padding_mask_crop=8, **large))
        with pytest.raises(ValueError, match="24x20 are too small"):
            pipe.check(**arguments("inpainting", output_type="pil", **large))
        with pytest.raises(ValueError, match="24x20 are too small"):
            pipe.check(**arguments("inpainting", output_type="pil", paste_back=True, height=256, width=256))
