"""Old scheduler files, opened by diffusers' pipelines and by ours: what is corrected, and the latents that come of it.

The latents must differ by at most 1e-3; measured: 1.6e-4, of values up to 34.
"""

import functools
import inspect
import json

import diffusers
import jax
import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from convert.random import TINY
from tests.pipelines import family, live_unclip
from tests.references import write_tokenizer
from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.checkpoints.repairs import REPAIRS, repaired, repaired_unet, repaired_vae
from unclip_jax.distributed.mesh import local_mesh
from unclip_jax.models.configs import UNetConfig, VAEConfig
from unclip_jax.reference import Reference
from unclip_jax.sampling.solvers import PUBLISHED_UNCLIP_SCHEDULER, scheduler_name
from unclip_jax.sampling.solvers.settings import given

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # within diffusers
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),  # there too
    pytest.mark.filterwarnings("ignore:In CPU autocast"),
    pytest.mark.filterwarnings("ignore:You have passed:FutureWarning"),  # several images of one prompt
    pytest.mark.filterwarnings("ignore:The configuration file of:FutureWarning"),  # what diffusers says of its repairs
    pytest.mark.filterwarnings("ignore:.* corrected as diffusers' :UserWarning"),  # and what we do
]

TOLERANCE = 1e-3
CLASSES = {
    name: kind
    for name, (kind, changes) in family.SCHEDULERS.items()
    if not changes  # each class once
}
COMMON = ("pndm", "ddim", "ddpm", "euler", "dpm++2m", "unipc")
RIGHT = {"steps_offset": 1, "clip_sample": False, "skip_prk_steps": True}
WRONG = {"steps_offset": 0, "clip_sample": True, "skip_prk_steps": False}
# Keys of the file and their values; `...` leaves a key out.
FILES = {
    "right": RIGHT,
    **{f"{key} wrong": {**RIGHT, key: value} for key, value in WRONG.items()},
    **{f"{key} absent": {**RIGHT, key: ...} for key in RIGHT},
    "all wrong": WRONG,
    "all absent": dict.fromkeys(RIGHT, ...),
}
# With these timesteps steps_offset counts in every class.
BASE = {**PUBLISHED_UNCLIP_SCHEDULER, "timestep_spacing": "leading"}


def written(kind, file):
    """What a scheduler_config.json of this class and with these keys holds."""
    settings = {**BASE, **FILES[file], "_class_name": kind}
    return {key: value for key, value in settings.items() if value is not ...}


def construct(pipeline, **parts):
    """diffusers' pipeline with these parts and nothing in the place of the others."""
    cls = getattr(diffusers, pipeline)
    parameters = inspect.signature(cls.__init__).parameters
    none = {name: None for name, p in parameters.items() if p.default is p.empty and name != "self"}
    quiet = {"requires_safety_checker": False} if "requires_safety_checker" in parameters else {}
    return cls(**{**none, **quiet, **parts})


def checkpoint_config(settings):
    return CheckpointConfig(
        unet=TINY.unet,
        vae=TINY.vae,
        text_encoder=TINY.text_encoder,
        image_encoder=None,
        reference=Reference.DIFFUSERS,
        scheduler=scheduler_name(settings),
        scheduler_config=settings,
    )


@pytest.mark.parametrize("pipeline", REPAIRS)
def test_the_settings_of_every_scheduler_after_every_constructor(pipeline):
    """Of the scheduler itself, and of one that takes its place, but that ours never clips."""
    for kind in CLASSES.values():
        for file in FILES:
            settings = {**written(kind, file), "num_train_timesteps": 20}  # some classes make tables of them at once
            theirs = construct(pipeline, scheduler=getattr(diffusers, kind).from_config(settings)).scheduler.config
            ours = repaired(checkpoint_config(settings), pipeline, "folder").scheduler_config
            for key in RIGHT:
                default = inspect.signature(getattr(diffusers, kind).__init__).parameters.get(key)
                value = ours.get(key, default and default.default)
                assert value == theirs.get(key), (kind, file, key)
            swapped = diffusers.DDIMScheduler.from_config(theirs).config["steps_offset"]
            assert given(ours).get("steps_offset", 0) == swapped, (kind, file)


@pytest.mark.parametrize("pipeline", REPAIRS)
@pytest.mark.parametrize("version", ["0.8.0", "0.9.0.dev0", "0.9.0", "0.10.2", "1.2.0", None])
def test_the_unets_size_after_every_constructor(pipeline, version):
    for size in (8, 63, 64, 96):
        file = {"sample_size": size, **({} if version is None else {"_diffusers_version": version})}
        small = {"block_out_channels": (32,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        unet = diffusers.UNet2DConditionModel.from_config({**file, **small, "layers_per_block": 1})
        theirs = construct(pipeline, unet=unet).unet.config.sample_size
        assert repaired_unet(UNetConfig(sample_size=size), file, pipeline, "folder").sample_size == theirs


@pytest.mark.parametrize("pipeline", REPAIRS)
@pytest.mark.parametrize("factor", [0.18215, 0.08333, 0.083])
def test_the_vaes_factor_after_every_constructor(pipeline, factor):
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), scaling_factor=factor)
    theirs = construct(pipeline, vae=vae).vae.config.scaling_factor
    assert repaired_vae(VAEConfig(scaling_factor=factor), pipeline, "folder").scaling_factor == theirs


# -- whole folders -----------------------------------------------------------------------------------------------------


def edit(folder, into, settings, **index):
    """A folder like `folder`, but for its scheduler's settings and for what is changed in its index."""
    into.mkdir()
    for part in folder.iterdir():
        if part.name not in ("scheduler", "model_index.json"):
            (into / part.name).symlink_to(part)
    (into / "scheduler").mkdir()
    (into / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    data = json.loads((folder / "model_index.json").read_text()) | index
    (into / "model_index.json").write_text(json.dumps(data))
    return into


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Name of a kind -> its folder, and diffusers' pipeline and ours from it."""
    torch.set_num_threads(1)  # the networks are tiny

    @functools.cache
    def both(name):
        folder = tmp_path_factory.mktemp("opened")
        if name == "unCLIP":
            tokenizer = CLIPTokenizer.from_pretrained(write_tokenizer(folder / "tokenizer-source"))
            live_unclip.build("h", tokenizer).save_pretrained(folder / "saved")
            pipes = live_unclip.open_theirs(folder / "saved"), live_unclip.open_ours(folder / "saved")
        else:
            family.build(family.KINDS[name], folder)
            pipes = family.open_both(family.KINDS[name], folder / "saved")
        return folder / "saved", *pipes

    return both


def open_again(name, folder, theirs, ours):
    """Both pipelines from another folder with the same networks, which diffusers need not read and we not compile."""
    parts = {part: value for part, value in theirs.components.items() if part != "scheduler"}
    quiet = {"requires_safety_checker": False} if "safety_checker" in parts else {}
    again = type(theirs).from_pretrained(folder, **parts, **quiet)
    again.set_progress_bar_config(disable=True)
    mesh = local_mesh(jax.local_devices()[:1])
    mine = type(ours).from_pretrained(folder, "float32", mesh)
    mine.progress, mine.programs = False, ours.programs
    return again, mine


def latents_error(name, opened, folder, monkeypatch, scheduler=None, steps=5):
    """The largest difference of the latents, and their largest value."""
    _, theirs, ours = opened(name)
    theirs, ours = open_again(name, folder, theirs, ours)
    if name != "unCLIP":
        settings = {"output_type": "latent", "repeats": 1}
        error, wanted = family.compare(family.KINDS[name], theirs, ours, scheduler, steps, **settings)
        return error, np.abs(wanted).max()
    settings = {"image": live_unclip.photo(0), "prompt": "a photo", "guidance_scale": 5.0}
    settings |= {"scheduler": scheduler, "num_inference_steps": steps, "output_type": "latent"}
    wanted, made = live_unclip.both(monkeypatch, theirs, ours, **settings)
    return np.abs(made - wanted).max(), np.abs(wanted).max()


def check(name, scheduler, file, opened, tmp_path, monkeypatch, by_name=None):
    """The latents of a folder with such a scheduler, or with another by its name, and their largest value."""
    kind = CLASSES[scheduler]
    base = opened(name)[0]
    prediction = json.loads((base / "scheduler" / "scheduler_config.json").read_text())["prediction_type"]
    settings = {**written(kind, file), "prediction_type": prediction}
    folder = edit(base, tmp_path / "edited", settings, scheduler=["diffusers", kind])
    error, largest = latents_error(name, opened, folder, monkeypatch, by_name)
    print(f"measured: {name}, {scheduler}, {file}, {by_name}: {error:.1e} of {largest:.1f}")
    assert error <= TOLERANCE
    return largest


PIPELINES = [*family.KINDS, "unCLIP"]


@pytest.mark.parametrize("scheduler", COMMON)
@pytest.mark.parametrize("file", ["right", "all wrong", "all absent"])
def test_text_to_image(scheduler, file, opened, tmp_path, monkeypatch):
    assert check("text to image", scheduler, file, opened, tmp_path, monkeypatch) > 2  # nothing was clipped


@pytest.mark.parametrize("scheduler", ["pndm", "ddim"])
@pytest.mark.parametrize("file", ["all wrong", "all absent"])
@pytest.mark.parametrize("name", [name for name in PIPELINES if not name.startswith("text")])
def test_other_pipelines(name, scheduler, file, opened, tmp_path, monkeypatch):
    check(name, scheduler, file, opened, tmp_path, monkeypatch)


@pytest.mark.parametrize(("scheduler", "by_name"), [("pndm", "ddim"), ("unipc", "pndm"), ("ddim", "ddpm")])
@pytest.mark.parametrize("file", ["all wrong", "all absent"])
def test_another_scheduler_by_its_name(scheduler, by_name, file, opened, tmp_path, monkeypatch):
    assert check("text to image", scheduler, file, opened, tmp_path, monkeypatch, by_name) > 2  # nothing was clipped


@pytest.mark.parametrize("said", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_an_index_that_names_another_class(said, opened, tmp_path, monkeypatch):
    """The index's counts, with the keys that the settings have."""
    base = opened("text to image")[0]
    settings = {**BASE, "_class_name": said, "algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}
    settings |= {"prediction_type": "epsilon"}
    for kind in ("DDIMScheduler", "PNDMScheduler", "EulerAncestralDiscreteScheduler"):
        folder = edit(base, tmp_path / kind, settings, scheduler=["diffusers", kind])
        error, largest = latents_error("text to image", opened, folder, monkeypatch)
        print(f"measured: index {kind}, settings {said}: {error:.1e} of {largest:.1f}")
        assert error <= TOLERANCE


@pytest.mark.heavy  # half an hour
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("scheduler", COMMON)
@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_scheduler_and_file(name, scheduler, file, opened, tmp_path, monkeypatch):
    check(name, scheduler, file, opened, tmp_path, monkeypatch)
