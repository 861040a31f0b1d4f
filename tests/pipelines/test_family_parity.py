"""The family's pipelines from folders that diffusers saved, against diffusers: same weights, noise and images.

The largest difference of the final image, in 0..1, must be at most 1e-3. docs/parity.md has what was measured, for
every pipeline and solver.
"""

import copy
import functools

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from tests.pipelines.family import KINDS, SCHEDULERS, TRAILING, build, compare, open_both

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # within diffusers
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),  # there too
    pytest.mark.filterwarnings("ignore:In CPU autocast"),
    pytest.mark.filterwarnings("ignore:You have passed 2 text prompts:FutureWarning"),  # one image for all
]

TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Name of a kind -> the kind, diffusers' pipeline and ours."""

    @functools.cache
    def both(name):
        kind = KINDS[name]
        return kind, *open_both(kind, build(kind, tmp_path_factory.mktemp("family")))

    return both


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("scheduler", ["pndm", "euler-a"])
def test_every_pipeline(name, scheduler, opened):
    error, wanted = compare(*opened(name), scheduler, 10)
    assert wanted.std() > 0.02  # an image, and not a flat one
    assert ((wanted > 0) & (wanted < 1)).mean() > 0.3  # most of it not clipped
    assert error <= TOLERANCE


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_solver(scheduler, opened):
    """From pure noise and from an image, where a multistep solver has no history at first."""
    for name, steps in (("text to image, v", 15), ("image to image", 7)):
        assert compare(*opened(name), scheduler, steps)[0] <= TOLERANCE, (name, steps)


@pytest.mark.parametrize("scheduler", ["heun", "dpm2"])
def test_a_known_part_between_the_two_calls_of_a_step(scheduler, opened):
    assert compare(*opened("inpainting, four channels"), scheduler, 3)[0] <= TOLERANCE


@pytest.mark.parametrize("name", ["text to image", "image to image", "inpainting", "upscaling"])
def test_without_guidance_and_with_noise(name, opened):
    assert compare(*opened(name), "ddim", 5, guidance_scale=1.0, repeats=1, eta=1.0)[0] <= TOLERANCE


@pytest.mark.parametrize(
    ("scheduler", "scales"),
    [
        ("ddim", {"image_guidance_scale": 1.0}),
        ("ddim", {"image_guidance_scale": 0.9}),  # which is none, of the text neither
        ("ddim", {"image_guidance_scale": 2.0, "guidance_scale": 1.0}),  # as this is
        ("euler", {"image_guidance_scale": 2.3, "guidance_scale": 7.5}),
    ],
)
def test_scales_of_an_image_and_an_instruction(scheduler, scales, opened):
    error, wanted = compare(*opened("instruction"), scheduler, 8, **scales)
    assert wanted.std() > 0.02
    assert error <= 2e-5  # 6e-6


def test_rescaled_guidance(opened):
    kind, theirs, ours = opened("text to image")
    error, _ = compare(kind, theirs, ours, "ddim", 8, guidance_scale=9.0, guidance_rescale=0.7)
    assert error <= TOLERANCE


def test_a_given_depth_map(opened, monkeypatch):
    kind, theirs, ours = opened("depth to image")
    call = type(theirs).__call__

    def with_tensor(self, depth_map, **arguments):
        return call(self, depth_map=torch.from_numpy(depth_map)[None], **arguments)

    monkeypatch.setattr(type(theirs), "__call__", with_tensor)
    depth = np.random.default_rng(0).random((40, 24), np.float32)
    error, _ = compare(kind, theirs, ours, "ddim", 8, depth_map=depth)
    assert error <= TOLERANCE


@pytest.fixture(scope="module")
def turbo(tmp_path_factory):
    """Name of a kind -> the kind, diffusers' pipeline and ours, from a folder with sd-turbo's name and scheduler."""
    folder = tmp_path_factory.mktemp("turbo")
    saved = build(KINDS["text to image"], folder, "EulerDiscreteScheduler", **TRAILING).rename(folder / "sd-turbo")
    return functools.cache(lambda name: (KINDS[name], *open_both(KINDS[name], saved)))


@pytest.mark.parametrize(
    ("name", "steps"), [*(("text to image", n) for n in (1, 2, 4)), *(("image to image", n) for n in (2, 4))]
)
def test_the_recipe_of_sd_turbo(name, steps, turbo):
    """Without guidance, by the folder's own scheduler."""
    kind, theirs, ours = turbo(name)
    assert ours.config.distilled
    error, wanted = compare(kind, theirs, ours, None, steps, guidance_scale=0.0, repeats=1)
    assert wanted.std() > 0.02
    assert error <= 2e-5  # 3e-6


@pytest.fixture
def consistency_lora(opened, tmp_path):
    """A LoRA of the UNet alone, of the modules and in the file that scripts for consistency distillation make."""
    unet = copy.deepcopy(opened("text to image")[1].unet)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "time_emb_proj"]
    targets += ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"]
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets))
    generator = torch.Generator().manual_seed(0)
    for key, parameter in unet.named_parameters():
        if "lora_B" in key:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    StableDiffusionPipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(unet))
    return tmp_path


def test_four_steps_by_a_consistency_lora(consistency_lora, opened):
    """From a prompt to its image, without guidance."""
    kind, theirs, ours = opened("text to image")
    settings = {"guidance_scale": 0.0, "repeats": 1}
    _, plain = compare(kind, theirs, ours, "tcd", 4, eta=0.3, **settings)
    theirs.load_lora_weights(str(consistency_lora))
    ours.load_lora_weights(consistency_lora)
    try:
        for scheduler, eta in (("tcd", 0.3), ("lcm", 0.0)):
            error, wanted = compare(kind, theirs, ours, scheduler, 4, eta=eta, **settings)
            assert error <= 2e-5, (scheduler, eta)  # 2e-6
            assert np.abs(wanted - plain).max() > 0.05
    finally:
        theirs.unload_lora_weights()
        ours.unload_lora_weights()
