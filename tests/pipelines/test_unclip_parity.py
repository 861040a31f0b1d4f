"""Whole pipelines from folders that diffusers saved, against diffusers itself: same weights, noise and images.

The largest difference of the final image, in 0..1, must be at most 1e-3; measured: 6e-5, most cases 1e-5.
"""

import functools
import sys

import diffusers.pipelines.stable_diffusion.pipeline_stable_unclip_img2img as reference_module
import jax
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableUnCLIPImg2ImgPipeline,
)
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPTokenizer,
)

from tests.pipelines.live_unclip import FORMS, build
from tests.references import write_tokenizer
from unclip_jax import UnCLIPPipeline
from unclip_jax.distributed.mesh import local_mesh
from unclip_jax.sampling.solvers import make_solver

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # within diffusers
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),  # there too
]

TOLERANCE = 1e-3
SCHEDULERS = {
    "ddim": (DDIMScheduler, {}),
    "pndm": (PNDMScheduler, {}),
    "dpm++2m": (DPMSolverMultistepScheduler, {}),
    "dpm++2m-karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "ddpm": (DDPMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler-a": (EulerAncestralDiscreteScheduler, {}),
    "heun-karras": (HeunDiscreteScheduler, {"use_karras_sigmas": True}),
    "lms-exponential": (LMSDiscreteScheduler, {"use_exponential_sigmas": True}),
    "dpm2-beta": (KDPM2DiscreteScheduler, {"use_beta_sigmas": True}),
    "dpm2-a": (KDPM2AncestralDiscreteScheduler, {}),
}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Form -> diffusers' pipeline and ours, from one folder."""
    tokenizer = CLIPTokenizer.from_pretrained(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))

    @functools.cache
    def pair(form):
        folder = tmp_path_factory.mktemp(form)
        build(form, tokenizer).save_pretrained(folder)
        return open_theirs(folder), open_ours(folder)

    return pair


def open_theirs(folder, **options):
    pipe = StableUnCLIPImg2ImgPipeline.from_pretrained(folder, **options).to(torch.float32)
    # The PIL path: transformers' torchvision path differs from it by up to a grey level.
    pipe.feature_extractor = CLIPImageProcessorPil.from_pretrained(folder / "feature_extractor")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def open_ours(folder, **options):
    pipe = UnCLIPPipeline.from_pretrained(folder, "float32", local_mesh(jax.local_devices()[:1]), **options)
    pipe.progress = False
    return pipe


def photo(seed, width=90, height=70):
    """Noise with large patches, so that neither resizing nor embedding washes it out."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def both(monkeypatch, theirs, ours, *, pictures=1, repeats=1, scheduler="pndm", size=(32, 32), eta=0.0, **settings):
    """The final images of diffusers and of ours, (B, H, W, 3) each (or latents), from the same noise.

    scheduler: a name in `SCHEDULERS`, or None for the folder's own.
    """
    rng = np.random.default_rng(1)
    batch, (height, width) = pictures * repeats, size
    latents = rng.standard_normal((batch, height // 2, width // 2, 4), np.float32)
    image_noise = rng.standard_normal((pictures, theirs.image_normalizer.config.embedding_dim), np.float32)
    name = ours.config.scheduler if scheduler is None else scheduler
    steps, own = settings["num_inference_steps"], scheduler is None
    solver = make_solver(name, ours.config.scheduler_config, steps, eta, own=own)
    step_noise = rng.standard_normal((solver.calls, *latents.shape), np.float32)
    settings |= {"height": height, "width": width, "num_images_per_prompt": repeats, "eta": eta}
    settings.setdefault("output_type", "np")
    # DPM2's ancestral form draws at the second call of each step.
    draws = iter(map(torch_order, step_noise[1::2] if scheduler == "dpm2-a" else step_noise))
    kind, changes = (type(theirs.scheduler), {}) if own else SCHEDULERS[scheduler]
    with monkeypatch.context() as patch:
        patch.setattr(reference_module, "randn_tensor", lambda shape, **options: torch.from_numpy(image_noise))
        module = sys.modules[kind.__module__]
        patch.setattr(module, "randn_tensor", lambda shape, **options: next(draws), raising=False)
        reference = theirs.scheduler if own else kind.from_config(theirs.scheduler.config, **changes)
        patch.setattr(theirs, "scheduler", reference)
        # What it draws it multiplies by this, and what it is given it does not.
        reference.set_timesteps(settings["num_inference_steps"])
        noise = torch_order(latents) * reference.init_noise_sigma
        in_torch = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in settings.items()}
        wanted = theirs(latents=noise, **in_torch).images
        if settings["output_type"] == "latent":
            wanted = np.moveaxis(wanted.numpy(), 1, -1)
    given = {"latents": latents, "image_noise": image_noise, "step_noise": step_noise if solver.stochastic else None}
    return wanted, ours(scheduler=scheduler, **given, **settings).images


def torch_order(array):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))


# What differs from 20 steps of PNDM with guidance 10 at noise level 0, and why.
CASES = {
    "published defaults": {},
    "ddim": {"scheduler": "ddim"},
    "ddim, stochastic": {"scheduler": "ddim", "eta": 1.0},
    "ddim, few steps, no guidance": {"scheduler": "ddim", "num_inference_steps": 5, "guidance_scale": 1.0},
    "pndm, many steps": {"num_inference_steps": 30, "noise_level": 500},
    "pndm, fewer steps than it has history": {"num_inference_steps": 5},
    "dpm++": {"scheduler": "dpm++2m", "noise_level": 999},
    "dpm++, few steps: lower order at the end": {"scheduler": "dpm++2m", "num_inference_steps": 5},
    "dpm++, many steps": {"scheduler": "dpm++2m", "num_inference_steps": 30, "guidance_scale": 1.0},
    "karras": {"scheduler": "dpm++2m-karras"},
    "karras, few steps": {"scheduler": "dpm++2m-karras", "num_inference_steps": 5, "noise_level": 500},
    "ddpm": {"scheduler": "ddpm", "noise_level": 300},
    "euler": {"scheduler": "euler"},
    "euler, ancestral": {"scheduler": "euler-a", "num_inference_steps": 30},
    "heun": {"scheduler": "heun-karras", "num_inference_steps": 10},
    "linear multistep": {"scheduler": "lms-exponential"},
    "dpm2": {"scheduler": "dpm2-beta", "num_inference_steps": 10},
    "dpm2, ancestral": {"scheduler": "dpm2-a", "num_inference_steps": 10},
    "negative prompt": {"prompt": "Two cats, 3 dogs & a café!", "negative_prompt": "blurry; ugly!!"},
    "wide": {"size": (32, 64), "scheduler": "ddim", "num_inference_steps": 5},
    "several pictures, several of each": {"pictures": 2, "repeats": 2, "scheduler": "ddim", "num_inference_steps": 5},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_final_images(case, form, pipelines, monkeypatch):
    theirs, ours = pipelines(form)
    settings = {"num_inference_steps": 20, "guidance_scale": 10.0, "noise_level": 0, "prompt": "a photo", **CASES[case]}
    images = [photo(seed) for seed in range(settings.get("pictures", 1))]
    if len(images) > 1:
        settings["prompt"] = [settings["prompt"]] * len(images)
    wanted, made = both(monkeypatch, theirs, ours, image=images if len(images) > 1 else images[0], **settings)
    assert wanted.std() > 0.02  # an image, and not a flat one
    assert ((wanted > 0) & (wanted < 1)).mean() > 0.3  # most of it not clipped
    assert np.abs(made - wanted).max() <= TOLERANCE


def test_embeddings_instead_of_an_image(pipelines, monkeypatch):
    embeds = np.random.default_rng(2).standard_normal((1, 24), np.float32)
    settings = {"num_inference_steps": 5, "noise_level": 100, "prompt": "a photo"}
    wanted, made = both(monkeypatch, *pipelines("l"), image_embeds=embeds, **settings)
    assert np.abs(made - wanted).max() <= TOLERANCE


@pytest.mark.parametrize("written", ["fp16", "bin", "sharded"])
def test_other_forms_of_the_folder(written, pipelines, tmp_path, monkeypatch):
    """Half precision as a variant, torch files, shards."""
    theirs, _ = pipelines("h")
    saved = {"fp16": {"variant": "fp16"}, "bin": {"safe_serialization": False}, "sharded": {"max_shard_size": "300KB"}}
    suffixes = {"fp16": "*.fp16.safetensors", "bin": "*.bin", "sharded": "*.index.json"}
    original = build("h", theirs.tokenizer)
    (original.to(torch.float16) if written == "fp16" else original).save_pretrained(tmp_path, **saved[written])
    assert list(tmp_path.rglob(suffixes[written]))
    opening = {"variant": "fp16"} if written == "fp16" else {}
    settings = {"image": photo(0), "num_inference_steps": 5, "prompt": "a photo", "guidance_scale": 10.0}
    wanted, made = both(monkeypatch, open_theirs(tmp_path, **opening), open_ours(tmp_path, **opening), **settings)
    assert np.abs(made - wanted).max() <= TOLERANCE
