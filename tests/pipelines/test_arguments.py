"""Every bad argument is a ValueError (or FileNotFoundError) of one line that names it, before anything is compiled."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import unclip_jax
from unclip_jax.checkpoints.source import open_checkpoint
from unclip_jax.pipelines.arguments import StableUnCLIPArguments, UnCLIPArguments
from unclip_jax.pipelines.checks import check_guidance, check_guidance_scale
from unclip_jax.pipelines.defaults import default
from unclip_jax.pipelines.instruct_arguments import InstructArguments
from unclip_jax.pipelines.unclip import check, check_weights
from unclip_jax.reference import Reference
from unclip_jax.sampling import PUBLISHED_UNCLIP_SCHEDULER, make_solver

PHOTO = np.zeros((70, 80, 3), np.uint8)
D = 48  # of the model's image embeddings
EMBEDS = np.zeros((1, D), np.float32)

# Changes to a good call, and words of the message.
BAD = [
    ({"height": 100}, ["height", "100", "multiple of"]),
    ({"width": 0}, ["width", "0"]),
    ({"width": -64}, ["width", "-64"]),
    ({"height": 128.0}, ["height", "128.0", "integer"]),
    ({"height": True}, ["height", "True"]),
    ({"height": 1 << 20}, ["height"]),
    ({"num_inference_steps": 0}, ["num_inference_steps", "0", "1000"]),
    ({"num_inference_steps": 1001}, ["num_inference_steps", "1001"]),
    ({"num_inference_steps": 2.5}, ["num_inference_steps", "2.5"]),
    ({"num_inference_steps": True}, ["num_inference_steps"]),
    ({"num_images_per_prompt": 0}, ["num_images_per_prompt"]),
    ({"noise_level": -1}, ["noise_level", "-1", "1000"]),
    ({"noise_level": 1001}, ["noise_level", "1001"]),
    ({"noise_level": 0.5}, ["noise_level", "0.5"]),
    ({"noise_level": [0, 1]}, ["noise_level", "2", "1 images"]),
    ({"guidance_scale": float("nan")}, ["guidance_scale", "nan"]),
    ({"guidance_scale": float("inf")}, ["guidance_scale", "inf"]),
    ({"guidance_scale": "7"}, ["guidance_scale", "'7'"]),
    ({"guidance_scale": None}, ["guidance_scale"]),
    ({"guidance_scale": [1.0, 2.0, 3.0]}, ["guidance_scale", "(3,)"]),
    ({"guidance_scale": [1.0, np.nan, 1.0, 1.0]}, ["guidance_scale", "NaN"]),
    ({"eta": -0.1}, ["eta", "-0.1"]),
    ({"eta": 1.1}, ["eta", "1.1"]),
    ({"seed": -1}, ["seed", "-1"]),
    ({"seed": 2**32}, ["seed"]),
    ({"seed": "0"}, ["seed", "'0'"]),
    ({"scheduler": "dimm"}, ["dimm", "did you mean 'ddim'", "pndm"]),
    ({"scheduler": 3}, ["scheduler", "3"]),
    ({"output_type": "jpeg"}, ["output_type", "jpeg", "pil"]),
    ({"batch_size": 0}, ["batch_size"]),
    ({"prompt": 7}, ["prompt", "7"]),
    ({"prompt": ["a", "b"]}, ["prompt", "2 strings"]),
    ({"negative_prompt": [None]}, ["negative_prompt"]),
    ({"image": None}, ["image", "image_embeds"]),
    ({"image_embeds": EMBEDS}, ["image_embeds", "not both"]),
    ({"image": []}, ["image", "empty"]),
    ({"image": "no/such/file.png"}, ["no/such/file.png"]),
    ({"image": 5}, ["image", "int"]),
    ({"image": PHOTO[:1, :1]}, ["1x1"]),
    ({"image": np.zeros((70, 80, 5), np.uint8)}, ["image", "(70, 80, 5)"]),
    ({"image": np.full((70, 80, 3), np.nan)}, ["image", "NaN"]),
    ({"image": np.full((70, 80, 3), 7.0)}, ["image", "7"]),
    ({"image": None, "image_embeds": np.full((1, D), np.nan)}, ["image_embeds", "NaN"]),
    ({"image": None, "image_embeds": np.zeros((1, 7))}, ["image_embeds", "(1, 7)", str(D)]),
    ({"image": None, "image_embeds": np.zeros((0, D))}, ["image_embeds"]),
    ({"image": None, "image_embeds": "x"}, ["image_embeds"]),
    ({"latents": np.zeros((1, 2, 2, 4))}, ["latents", "(1, 2, 2, 4)"]),
    ({"latents": np.full((1, 16, 16, 4), np.inf)}, ["latents"]),
    ({"image_noise": np.zeros((3, D))}, ["image_noise", f"(3, {D})"]),
    ({"step_noise": np.zeros((1, 1))}, ["step_noise", "(1, 1)"]),
    ({"prompt_embeds": np.zeros((1, 3, 3))}, ["prompt_embeds", "(1, 3, 3)"]),
    ({"negative_prompt_embeds": np.zeros((2, 2))}, ["negative_prompt_embeds", "(2, 2)"]),
    ({"image_weights": [1.0, 1.0]}, ["image_weights", "(2,)"]),
    ({"image": [PHOTO, PHOTO], "image_weights": [1.0, -1.0]}, ["image_weights", "zero"]),
    ({"image": [PHOTO, PHOTO], "image_weights": [0.0, 0.0]}, ["image_weights", "zero"]),
    ({"image": [PHOTO, PHOTO], "image_weights": [np.nan, 1.0]}, ["image_weights", "NaN"]),
    ({"mix_noise_level": 10}, ["mix_noise_level", "image_weights"]),
    ({"image_weights": [1.0], "mix_noise_level": 2000}, ["2000"]),
]


@pytest.fixture(scope="module")
def config(golden_files):
    file, options = golden_files("unclip_h")
    with open_checkpoint(file, **options) as checkpoint:
        return checkpoint.config


@pytest.mark.parametrize(("change", "words"), BAD, ids=[f"{i}-{'-'.join(c)}" for i, (c, _) in enumerate(BAD)])
def test_bad_arguments(change, words, config):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        check(config, UnCLIPArguments(**{"image": PHOTO, "num_inference_steps": 4, **change}))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_files_that_are_no_images_are_named(config, tmp_path):
    (tmp_path / "notes.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"notes\.png"):
        check(config, UnCLIPArguments(image=tmp_path / "notes.png"))
    Image.fromarray(PHOTO).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"half\.png"):
        check(config, UnCLIPArguments(image=tmp_path / "half.png"))


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=5))
def test_weights_are_taken_or_refused_by_their_sum(weights):
    total, size = abs(sum(weights)), sum(map(abs, weights))
    if total > 1e-3 * max(size, 1e-30):
        np.testing.assert_allclose(check_weights(weights, len(weights)), np.float32(weights))
    elif total == 0:
        with pytest.raises(ValueError, match="zero"):
            check_weights(weights, len(weights))


@given(st.integers(1, 6), st.integers(1, 6), st.floats(-5, 20))
def test_guidance_has_a_scale_for_each_call_and_image(steps, batch, value):
    """PNDM has one call more than steps; its two calls of a repeated timestep share a scale."""
    solver = make_solver("pndm", PUBLISHED_UNCLIP_SCHEDULER, steps)
    original = dataclasses.replace(solver, reference=Reference.ORIGINAL)
    scale = check_guidance_scale("guidance_scale", value, solver, batch)
    np.testing.assert_array_equal(scale, np.full((solver.calls, batch), value, np.float32))
    for of_reference, on in ((solver, value > 1), (original, value != 1)):
        assert check_guidance(UnCLIPArguments(guidance_scale=value), of_reference, batch)[0].unconditional == on
    by_step = np.arange(steps, dtype=np.float32)
    scale = check_guidance_scale("guidance_scale", by_step, solver, batch)
    assert scale.shape == (solver.calls, batch)
    assert (np.diff(scale[:, 0]) >= 0).all()
    assert set(scale.ravel()) == set(by_step)


@pytest.mark.parametrize(
    ("scale", "image_scale", "rows", "original"),
    [
        (7.5, 1.5, 3, 3),
        (7.5, 1.0, 3, 3),
        (7.5, 0.9, 1, 3),  # as in diffusers, where it is below 1
        (1.0, 1.5, 1, 3),  # or where the other is not above
        (1.0, 1.0, 1, 1),
        ([1.0, 2.0, 1.0], 1.5, 3, 3),
        ([1.0, 2.0, 1.0], 0.9, 1, 3),
        (7.5, [0.5, 1.0, 1.0], 3, 3),
        (1.0, [1.5, 1.0, 1.0], 1, 3),
        ([1.0] * 3, [1.0] * 3, 1, 1),
    ],
)
def test_scales_of_an_image_and_an_instruction_switch_both_off(scale, image_scale, rows, original):
    solver = make_solver("ddim", PUBLISHED_UNCLIP_SCHEDULER, 3)
    a = InstructArguments(guidance_scale=scale, image_guidance_scale=image_scale)
    for expected, of_reference in (
        (rows, solver),
        (original, dataclasses.replace(solver, reference=Reference.ORIGINAL)),
    ):
        guidance, strengths = check_guidance(a, of_reference, 2)
        assert guidance.rows == expected
        assert strengths.keys() == ({"guidance_scale", "image_guidance_scale"} if expected == 3 else set())


def test_an_interval_takes_both_scales_to_one():
    solver = make_solver("ddim", PUBLISHED_UNCLIP_SCHEDULER, 3)
    _, strengths = check_guidance(InstructArguments(guidance_interval=(0.5, 1.0)), solver, 1)
    np.testing.assert_array_equal(strengths["guidance_scale"][:, 0], [1, 7.5, 1])
    np.testing.assert_array_equal(strengths["image_guidance_scale"][:, 0], [1, 1.5, 1])


def test_the_table_of_defaults_is_that_of_the_arguments():
    page = (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+Pipeline)`, .*$", page, re.MULTILINE)
    assert len(rows) == 8
    for name in rows:
        line = next(line for line in page.splitlines() if line.startswith(f"| `{name}`"))
        *_, steps, scale, others = (cell.strip() for cell in line.strip("|").split("|"))
        task = getattr(unclip_jax, name)
        arguments = StableUnCLIPArguments if name == "StableUnCLIPPipeline" else task.task.arguments
        assert int(steps) == default(arguments, "num_inference_steps")
        assert float(scale) == default(arguments, "guidance_scale")
        for argument, value in re.findall(r"`(\w+)` ([\d.]+)", others):
            assert float(value) == default(arguments, argument)
