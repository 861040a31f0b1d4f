"""The loop of a call: a network evaluation runs the rows of guidance that count in it, and no others."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.pipelines.small_family import STEPS, Compilations, arguments
from unclip_jax import ProjectedGuidance
from unclip_jax.pipelines import run
from unclip_jax.sampling.guidance import Guidance

INTERVAL = {"guidance_interval": (0.5, 1.0)}  # the second of three evaluations
EVERYTHING = {
    **INTERVAL,
    "guidance_rescale": 0.5,
    "pag_scale": 2.0,
    "projected_guidance": ProjectedGuidance(0.5, momentum=-0.5),
}
TWO_ROWS, ONE_ROW = Guidance(), Guidance(unconditional=False)


def counted(pipe, request):
    """The latents of a call, and for every program of the loop its guidance, its evaluations, and the UNet's rows."""
    ran = []

    def run_steps(unet, solver, carry, grid, constants, seed, indices, span, controls, *, guidance, tile):
        evaluations = np.asarray(grid["index"])[slice(*span)].tolist()
        (rows,) = {len(array) for array in jax.tree.leaves((constants.text, constants.classes, constants.channels))}
        ran.append((guidance, evaluations, rows))
        given = (unet, solver, carry, grid, constants, seed, indices, span, controls)
        return pipe.programs.run_steps(*given, guidance=guidance, tile=tile)

    programs = dataclasses.replace(pipe.programs, run_steps=run_steps)
    parts = dataclasses.replace(pipe.parts, programs=programs, progress=False)
    return run.sample_latents(parts, request, pipe.task.conditions(parts, request)), ran


def with_all_rows(pipe, request):
    """The latents of a call that runs all rows in every evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "guidance_by_call", lambda guidance, strengths, calls: [guidance] * calls)
        latents, ran = counted(pipe, request)
    assert {rows for _, _, rows in ran} == {request.batch * request.guidance.rows}
    return latents


def assert_close(got, want):
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


@pytest.mark.parametrize("name", ["variations", "inpainting"])
def test_outside_an_interval_an_image_is_one_row(name, family):
    """Of calls, of chunks and of a stream."""
    pipe, settings = family(name), arguments(name, **INTERVAL)
    latents, ran = counted(pipe, pipe.check(**settings))
    assert ran == [(ONE_ROW, [0], 1), (TWO_ROWS, [1], 2), (ONE_ROW, [2], 1)]
    assert_close(latents, with_all_rows(pipe, pipe.check(**settings)))
    pair, ran = counted(pipe, pipe.check(**settings, num_images_per_prompt=2, batch_size=1))
    assert [rows for _, _, rows in ran] == [1, 2, 1, 1, 2, 1]
    np.testing.assert_array_equal(pair[:1], latents)
    del settings["output_type"]
    *_, last = pipe.stream(**settings)
    assert_close(last.latents, latents)


def test_other_intervals_compile_nothing(family):
    """Of a loop that is one program for each kind of evaluation, wherever it begins and ends."""
    pipe = family("variations")
    pipe(**arguments("variations", **INTERVAL))
    with Compilations() as compiled:
        for interval, needed in (((0.5, 5.0), [TWO_ROWS, ONE_ROW]), ((0.01, 0.5), [ONE_ROW, TWO_ROWS])):
            _, ran = counted(pipe, pipe.check(**arguments("variations", guidance_interval=interval)))
            assert [guidance for guidance, *_ in ran] == needed
            assert [call for _, evaluations, _ in ran for call in evaluations] == [*range(STEPS)]
    assert compiled.count == 0


@pytest.mark.parametrize("progress", [False, True])
def test_another_number_of_steps_compiles_nothing(family, progress, monkeypatch):
    """Nor does another share of them: of a run from an image, also."""
    for name, others in (("variations", [{}]), ("image to image", [{"strength": 1.0}, {"strength": 0.5}])):
        pipe = family(name)
        monkeypatch.setattr(pipe, "progress", progress)
        pipe(**arguments(name, num_inference_steps=4))
        with Compilations() as compiled:
            for steps in (5, 11):
                for other in others:
                    pipe(**arguments(name, num_inference_steps=steps, **other))
        assert compiled.count == 0


def test_watched_steps_make_the_same_image(family, monkeypatch):
    pipe = family("variations")
    monkeypatch.setattr(pipe, "progress", False)
    alone = pipe(**arguments("variations")).latents
    monkeypatch.setattr(pipe, "progress", True)
    np.testing.assert_array_equal(pipe(**arguments("variations")).latents, alone)


def test_every_kind_of_guidance_in_an_interval(family):
    """APG's momentum needs the unconditional row up to the interval's end, and nothing needs it after."""
    pipe, settings = family("variations"), arguments("variations", **EVERYTHING)
    latents, ran = counted(pipe, pipe.check(**settings))
    before = Guidance(projected=True, rescaled=True)
    assert ran == [(before, [0], 2), (dataclasses.replace(before, perturbed=True), [1], 3), (ONE_ROW, [2], 1)]
    assert_close(latents, with_all_rows(pipe, pipe.check(**settings)))
    without = pipe(**arguments("variations", **{**EVERYTHING, "projected_guidance": ProjectedGuidance(0.5)})).latents
    assert np.linalg.norm(without - latents) > 1e-3 * np.linalg.norm(latents)


def test_a_scale_of_one_is_one_row(family):
    """However it is given: for all, by step, by image, or by an interval without evaluations."""
    pipe = family("variations")
    ways = [{"guidance_scale": 1.0}, {"guidance_scale": [1.0] * STEPS}, {"guidance_interval": (50.0, 60.0)}]
    requests = [pipe.check(**arguments("variations", guidance_rescale=0.5, **way)) for way in ways]
    for request in requests:
        assert request.guidance == ONE_ROW
        latents, ran = counted(pipe, request)
        assert ran == [(ONE_ROW, [*range(STEPS)], 1)]
    two_rows = dataclasses.replace(
        requests[0],
        guidance=Guidance(rescaled=True),
        strengths={"guidance_scale": np.ones((STEPS, 1), np.float32), "guidance_rescale": np.full((STEPS, 1), 0.5)},
    )
    assert_close(latents, with_all_rows(pipe, two_rows))
    for scales, guidance in (((1.0, 1.0), ONE_ROW), ((1.0, 3.0), TWO_ROWS)):
        by_image = arguments("variations", num_images_per_prompt=2, guidance_scale=scales)
        assert pipe.check(**by_image).guidance == guidance
