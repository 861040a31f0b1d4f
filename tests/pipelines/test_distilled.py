"""Checkpoints that make an image in one step: what a call does that does not say how many, and how guided."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import unclip_jax
from tests import small_models
from tests.pipelines import small_family
from tests.pipelines.small_family import one_level, photo
from unclip_jax import cli
from unclip_jax.image_files import read_recipe
from unclip_jax.pipelines.arguments import InitImageArguments, TextToImageArguments
from unclip_jax.pipelines.defaults import with_own_defaults
from unclip_jax.sampling import make_solver

SPACING = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
PLAIN = one_level(small_models.TEXT_TO_IMAGE)
DISTILLED = dataclasses.replace(
    PLAIN, distilled=True, scheduler="euler", scheduler_config={**PLAIN.scheduler_config, **SPACING}
)


def checked(pipeline, config=DISTILLED, **settings):
    """The request of a call. It needs no networks."""
    task = getattr(unclip_jax, pipeline).task
    given = {} if pipeline == "TextToImagePipeline" else {"image": photo()}
    given |= {"mask_image": small_family.hole()} if pipeline == "InpaintPipeline" else {}
    return task.check(config, with_own_defaults(task.arguments(prompt="a cat", **given, **settings), config.distilled))


@pytest.mark.parametrize("pipeline", ["TextToImagePipeline", "ImageToImagePipeline", "InpaintPipeline"])
def test_a_call_makes_one_step_without_guidance(pipeline):
    request = checked(pipeline)
    assert (request.solver.calls, request.guidance.unconditional) == (1, False)
    other = checked(pipeline, PLAIN)
    assert other.solver.recipe.num_inference_steps == 50
    assert other.guidance.unconditional


@pytest.mark.parametrize("pipeline", ["TextToImagePipeline", "ImageToImagePipeline"])
def test_what_a_call_says_wins(pipeline):
    """Also where it says what others have by default."""
    request = checked(pipeline, num_inference_steps=50, guidance_scale=7.5)
    assert request.solver.recipe.num_inference_steps == 50
    assert (request.strengths["guidance_scale"] == 7.5).all()
    request = checked(pipeline, scheduler=make_solver("ddim", PLAIN.scheduler_config, 5))
    assert request.solver.recipe.num_inference_steps == 5
    for scale in (0.0, 1.0):
        assert not checked(pipeline, num_inference_steps=4, guidance_scale=scale).guidance.unconditional


@given(st.floats(1e-3, 1))
def test_from_an_image_it_has_the_fewest_steps_that_leave_one(strength):
    steps = with_own_defaults(InitImageArguments(strength=strength), True).num_inference_steps
    assert int(steps * strength) == 1
    assert steps == 1 or (steps - 1) * strength < 1


@pytest.mark.parametrize("strength", [0, -1, 1.5, float("nan"), "much"])
def test_a_wrong_strength_is_refused_as_ever(strength):
    with pytest.raises(ValueError, match="strength is "):
        checked("ImageToImagePipeline", strength=strength)


def test_steps_that_a_strength_leaves_none_of_are_refused():
    with pytest.raises(ValueError, match="leaves no step; want a product of 1 or more"):
        checked("ImageToImagePipeline", num_inference_steps=1)


def test_arguments_of_other_checkpoints_are_as_they_were():
    given = TextToImageArguments("a cat", num_inference_steps=3)
    assert vars(with_own_defaults(given, False)) == vars(given)


@pytest.mark.e2e
def test_recipes_have_what_was_done(tmp_path, monkeypatch):
    """Of pictures, and of rows."""
    monkeypatch.chdir(tmp_path)
    small_models.write(DISTILLED, tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a cat"}\n')
    size = ["--model", "model", "--height", "20", "--width", "24", "--devices", "1"]
    assert cli.main(["text-to-image", "a cat", *size, "--out", "one"]) == 0
    assert cli.main(["text-to-image", "--from", "rows.jsonl", *size, "--out", "many"]) == 0
    lines = (tmp_path / "many").glob("manifest/*.jsonl")
    recipes = [json.loads(line)["recipe"] for path in lines for line in path.read_text("utf-8").splitlines()]
    for recipe in (read_recipe(tmp_path / "one" / "0001-000.png"), *recipes):
        assert (recipe["num_inference_steps"], recipe["guidance_scale"]) == (1, 1)
    assert len(recipes) == 1
