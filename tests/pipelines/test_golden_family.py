"""The family's pipelines against recordings of the original, from its own checkpoints: latents within 1e-4 relative.

Measured: at most 6e-6.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest

import unclip_jax
from tests import small_models
from tests.golden_weights import GOLDEN
from unclip_jax.distributed.mesh import local_mesh
from unclip_jax.sampling.solvers import PUBLISHED_UNCLIP_SCHEDULER, make_solver

TOLERANCE = 1e-4
CASES = json.loads((GOLDEN / "family.json").read_text("utf-8"))["cases"]
SIZE = {"height": 128, "width": 192}


@pytest.fixture(scope="module")
def arrays():
    return np.load(GOLDEN / "family.npz")


@pytest.fixture(scope="module")
def run(golden_files, arrays):
    """A case, a pipeline and what it is given besides -> the relative error of its latents."""

    def latents(case, pipeline, **given):
        file, options = golden_files(CASES[case]["model"])
        pipe = pipeline.from_pretrained(file, "float32", local_mesh(jax.local_devices()[:1]), **options)
        pipe.progress = False
        asked = {"num_inference_steps": CASES[case]["steps"], "guidance_scale": 3.0, "output_type": "latent"}
        asked |= {"prompt": CASES[case]["prompt"], "scheduler": "ldm-ddim"}
        got = pipe(**{**asked, **given}).latents
        want = channels_last(arrays[f"{case}.samples"])
        return np.linalg.norm(got - want) / np.linalg.norm(want)

    return latents


def channels_last(array):
    return np.ascontiguousarray(np.moveaxis(array, -3, -1))


def pixels(array):
    """(3, H, W) in -1..1 -> (H, W, 3) in 0..1."""
    return (channels_last(array) + 1) / 2


def step_noise(arrays, case):
    names = sorted(name for name in arrays.files if name.startswith(f"{case}.rng_"))
    return np.stack([channels_last(arrays[name]) for name in names])


@pytest.mark.parametrize(
    ("case", "scheduler"),
    [
        pytest.param("txt2img_eps_ddim", "ldm-ddim", marks=pytest.mark.e2e),
        pytest.param("txt2img_eps_plms", "ldm-plms", marks=pytest.mark.e2e),
        ("txt2img_v_ddim", "ldm-ddim"),
        pytest.param("txt2img_v_dpm", "ldm-dpm", marks=pytest.mark.e2e),
    ],
)
def test_text_to_image(case, scheduler, run, arrays):
    given = {"scheduler": scheduler, "latents": channels_last(arrays[f"{case}.x_T"]), "num_images_per_prompt": 2}
    if CASES[case]["eta"]:
        given |= {"eta": CASES[case]["eta"], "step_noise": step_noise(arrays, case)}
    assert run(case, unclip_jax.TextToImagePipeline, **SIZE, **given) <= TOLERANCE


@pytest.mark.e2e
def test_image_to_image(run, arrays):
    error = run(
        "img2img",
        unclip_jax.ImageToImagePipeline,
        image=[pixels(picture) for picture in arrays["img2img.init_image"]],
        prompt=[CASES["img2img"]["prompt"]] * 2,
        strength=0.6,
        num_inference_steps=10,
        posterior_noise=channels_last(arrays["img2img.enc_rng_000_randn"]),
        noise=channels_last(arrays["img2img.noise_rng_000_randn_like"]),
    )
    assert error <= TOLERANCE


@pytest.mark.e2e
def test_inpainting(run, arrays):
    error = run(
        "inpaint",
        unclip_jax.InpaintPipeline,
        image=pixels(arrays["inpaint.image"][0]),
        mask_image=arrays["inpaint.mask_in"],
        num_images_per_prompt=2,
        eta=1.0,
        posterior_noise=channels_last(arrays["inpaint.enc_rng_000_randn"]),
        latents=channels_last(arrays["inpaint.x_T"]),
        step_noise=step_noise(arrays, "inpaint"),
    )
    assert error <= TOLERANCE


@pytest.mark.e2e
def test_depth_to_image(run, arrays):
    """The recording begins with pure noise and runs all steps: that is a solver of one's own, which is not cut."""
    noise = channels_last(arrays["depth.x_T"])
    config = PUBLISHED_UNCLIP_SCHEDULER | {"prediction_type": "epsilon"}
    error = run(
        "depth",
        unclip_jax.DepthToImagePipeline,
        image=np.zeros((128, 192, 3), np.uint8),
        depth_map=arrays["depth.depth_raw"][0, 0],
        scheduler=dataclasses.replace(make_solver("ldm-ddim", config, CASES["depth"]["steps"]), recipe=None),
        strength=1.0,
        noise=noise,
    )
    assert error <= TOLERANCE


@pytest.mark.e2e
def test_depth_at_full_strength_begins_with_pure_noise(tmp_path):
    """As the original's demo does, with one step less."""
    folder, mesh = small_models.write(small_models.DEPTH, tmp_path / "model"), local_mesh(jax.local_devices()[:1])
    pipe = unclip_jax.DepthToImagePipeline.from_pretrained(folder, "float32", mesh)
    pipe.progress = False
    asked = {"depth_map": np.eye(32), "strength": 1.0, "num_inference_steps": 4, "output_type": "latent"}
    pictures = [np.full((32, 32, 3), gray, np.uint8) for gray in (0, 255)]
    assert pipe.check(image=pictures[0], scheduler="ldm-ddim", **asked).solver.calls == 3
    for scheduler, equal in (("ldm-ddim", True), ("ddim", False)):
        made = [pipe(image=picture, scheduler=scheduler, **asked).latents for picture in pictures]
        assert np.array_equal(*made) == equal


@pytest.mark.e2e
def test_upscaling(run, arrays):
    error = run(
        "x4",
        unclip_jax.UpscalePipeline,
        image=pixels(arrays["x4.lr"][0]),
        noise_level=CASES["x4"]["noise_level"][0],
        low_res_noise=channels_last(arrays["x4.aug_rng_000_randn_like"]),
        latents=channels_last(arrays["x4.x_T"]),
    )
    assert error <= TOLERANCE
