"""Old files of a folder are corrected by the pipeline that is made of it, as diffusers' does, and it is said."""

import dataclasses
import json
import re
import shutil
import warnings

import numpy as np
import pytest

import unclip_jax
from convert.architecture.diffusers import from_folder
from tests import small_models
from tests.convert.diffusers_folder import write_configs
from tests.pipelines import small_family
from unclip_jax import cli
from unclip_jax.checkpoints.repairs import REPAIRS, repaired
from unclip_jax.reference import Reference
from unclip_jax.sampling import make_solver
from unclip_jax.sampling.solvers import PUBLISHED_UNCLIP_SCHEDULER

# What each pipeline of ours corrects in a file that has everything wrong.
CORRECTED = {
    "TextToImagePipeline": {"steps_offset": 1, "clip_sample": False},
    "ImageToImagePipeline": {"steps_offset": 1, "clip_sample": False},
    "InpaintPipeline": {"steps_offset": 1, "skip_prk_steps": True},
    "DepthToImagePipeline": {},
    "UpscalePipeline": {},
    "UnCLIPPipeline": {},
    "InstructPipeline": {},
    "DepthPipeline": {},
    "NormalsPipeline": {},
}
WRONG = {"steps_offset": 0, "clip_sample": True, "skip_prk_steps": False}


def settings(kind="PNDMScheduler", **changes):
    """The published file, of another class and with changes; `...` leaves a key out."""
    changed = {**PUBLISHED_UNCLIP_SCHEDULER, **changes, "_class_name": kind}
    return {key: value for key, value in changed.items() if value is not ...}


def small(kind, **changes):
    """A small checkpoint's configuration with such settings."""
    scheduler = {"PNDMScheduler": "pndm", "DDIMScheduler": "ddim", "EulerDiscreteScheduler": "euler"}[kind]
    config = settings(kind, **changes)
    return dataclasses.replace(small_models.TEXT_TO_IMAGE, scheduler=scheduler, scheduler_config=config)


@pytest.fixture
def edited(family_folder, tmp_path):
    """edited(kind, **changes): a converted text-to-image checkpoint with these `settings` of its scheduler."""

    def write(kind, **changes):
        shutil.copytree(family_folder("TEXT_TO_IMAGE"), tmp_path / "edited", dirs_exist_ok=True)
        path, config = tmp_path / "edited" / "config.json", small(kind, **changes)
        scheduler = {"scheduler": config.scheduler, "scheduler_config": config.scheduler_config}
        path.write_text(json.dumps({**json.loads(path.read_text()), **scheduler}))
        return tmp_path / "edited"

    return write


def open_quietly(pipeline, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return small_family.open_pipeline(folder, pipeline, progress=False)


def test_every_pipeline_has_a_row():
    pipelines = {getattr(unclip_jax, name).diffusers_class for name in CORRECTED}
    assert pipelines | {"StableUnCLIPPipeline"} == REPAIRS.keys()


@pytest.mark.parametrize("pipeline", CORRECTED)
def test_wrong_keys_are_corrected_and_named(pipeline):
    config, name = small("PNDMScheduler", **WRONG), getattr(unclip_jax, pipeline).diffusers_class
    expected = {**config.scheduler_config, **CORRECTED[pipeline]}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = repaired(config, name, "a/folder")
    assert made.scheduler_config == expected
    said = [str(warning.message) for warning in caught if "scaling_factor" not in str(warning.message)]
    changes = "; ".join(f"{key} is {value}, not {WRONG[key]}" for key, value in CORRECTED[pipeline].items())
    assert said == ([f"a/folder: corrected as diffusers' {name} does: {changes}"] if changes else [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert repaired(made, name, "a/folder") == made  # once is enough


@pytest.mark.parametrize(
    ("kind", "absent", "corrected"),
    [
        ("PNDMScheduler", "steps_offset", {"steps_offset": 1}),
        ("PNDMScheduler", "clip_sample", {}),  # the class has no such key
        ("DDIMScheduler", "clip_sample", {"clip_sample": False}),
        ("EulerDiscreteScheduler", "skip_prk_steps", {}),
    ],
)
def test_absent_keys_are_corrected_where_the_class_has_a_wrong_default(kind, absent, corrected):
    """They are marked as diffusers marks them: whoever takes the scheduler's place does not get them."""
    config = small(kind, **{absent: ...})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = repaired(config, "StableDiffusionPipeline", "folder").scheduler_config
    marked = {"_use_default_values": list(corrected)} if corrected else {}
    assert made == {**config.scheduler_config, **corrected, **marked}
    assert len(caught) == len(corrected)
    assert all("not left out" in str(warning.message) for warning in caught)


def test_runge_kutta_is_left_out_of_inpainting_alone():
    for pipeline, skips in (("StableDiffusionInpaintPipeline", True), ("StableDiffusionImg2ImgPipeline", None)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = repaired(small("PNDMScheduler", skip_prk_steps=..., steps_offset=0), pipeline, "folder")
        assert made.scheduler_config.get("skip_prk_steps") is skips


def test_files_of_the_original_stay_as_they_are(recwarn):
    config = dataclasses.replace(small("PNDMScheduler", **WRONG), reference=Reference.ORIGINAL)
    for name in REPAIRS:
        assert repaired(config, name, "file") == config
    assert not recwarn.list


def test_the_upscalers_scaling_factor():
    config = small("PNDMScheduler")
    with pytest.warns(UserWarning, match=r"scaling_factor is 0\.08333, not 0\.18215"):
        made = repaired(config, "StableDiffusionUpscalePipeline", "folder")
    assert made.vae.scaling_factor == 0.08333
    assert repaired(config, "StableDiffusionPipeline", "folder") == config


@pytest.mark.parametrize(
    ("pipeline", "version", "size", "expected"),
    [
        ("StableDiffusionPipeline", "0.8.1", 32, 64),
        ("StableDiffusionInpaintPipeline", "0.8.1", 63, 64),
        ("StableDiffusionPipeline", "0.8.1", 96, 96),
        ("StableDiffusionPipeline", "0.9.0.dev0", 32, 32),
        ("StableDiffusionPipeline", "0.10.2", 32, 32),
        ("StableDiffusionPipeline", ..., 32, 32),
        ("StableDiffusionPipeline", None, 32, 32),
        ("StableDiffusionPipeline", "eight", 32, 32),
    ],
)
def test_the_unets_size_in_a_folder(tmp_path, pipeline, version, size, expected):
    changes = {
        ("model_index.json", "_class_name"): pipeline,
        **{("unet/config.json", key): None for key in ("class_embed_type", "projection_class_embeddings_input_dim")},
        ("unet/config.json", "_diffusers_version"): version,
        ("unet/config.json", "sample_size"): size,
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = from_folder(write_configs(tmp_path, changes)).unet.sample_size
    assert made == expected
    assert [re.sub(".*: ", "", str(warning.message)) for warning in caught] == (
        [f"the UNet's sample_size is {made}, not {size}"] if made != size else []
    )


NOISE = np.random.default_rng(0).standard_normal((1, 10, 12, 4)).astype(np.float32)
CALL = {"prompt": "a cat", "negative_prompt": "bad", "guidance_scale": 5.0, "num_inference_steps": 4, "latents": NOISE}
CALL |= {"height": small_family.HEIGHT, "width": small_family.WIDTH, "output_type": "latent"}


def test_wrong_and_absent_keys_give_the_latents_of_right_ones(edited):
    right = open_quietly("TextToImagePipeline", edited("DDIMScheduler"))(**CALL).latents
    assert np.abs(right).max() > 1.5  # which clipping would not leave
    for changes in ({"clip_sample": True, "steps_offset": 0}, {"clip_sample": ..., "steps_offset": ...}):
        made = open_quietly("TextToImagePipeline", edited("DDIMScheduler", **changes))(**CALL).latents
        np.testing.assert_array_equal(made, right)


@pytest.mark.parametrize("changes", [{"clip_sample": ...}, {"clip_sample": True}, {"thresholding": True}])
def test_a_scheduler_by_name_never_clips(edited, changes):
    """Not even in inpainting, whose class leaves a file's own scheduler to clip."""
    hole = {**small_family.HOLE, **{key: value for key, value in CALL.items() if key not in ("height", "width")}}
    ours = open_quietly("InpaintPipeline", edited("DDIMScheduler", **changes))
    free = make_solver("ddim", settings("DDIMScheduler"), 4)
    made = ours(**hole, scheduler="ddim").latents
    np.testing.assert_array_equal(made, ours(**hole, scheduler=free).latents)
    assert np.abs(ours(**hole).latents - made).max() > 0.1


def test_image_to_image_with_runge_kutta_steps(edited):
    """Twelve of its calls, from where the run begins, and the rest."""
    ours = open_quietly("ImageToImagePipeline", edited("PNDMScheduler", skip_prk_steps=False))
    request = ours.check(image=small_family.photo(), strength=0.5, num_inference_steps=10)
    assert request.solver.calls == 10 + 9 - 5
    with pytest.raises(ValueError, match="num_inference_steps is 3; want 4 to 1000 for 'pndm' with skip_prk_steps"):
        ours.check(image=small_family.photo(), num_inference_steps=3)


def test_the_command_line_says_it_in_one_line(edited, tmp_path, capsys):
    folder = edited("PNDMScheduler", steps_offset=0)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        arguments = ["text-to-image", "a cat", "--model", folder, "--steps", 1, "--out", tmp_path / "out"]
        assert (
            cli.main([*map(str, arguments), "--height", str(small_family.HEIGHT), "--width", str(small_family.WIDTH)])
            == 0
        )
    said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(said) == 1
    assert said[0].endswith("corrected as diffusers' StableDiffusionPipeline does: steps_offset is 1, not 0")
