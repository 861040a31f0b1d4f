"""Calls with ControlNets against diffusers': same weights, noise and hints.

diffusers has ControlNets for text to image, image to image and inpainting. Into its pipelines for depth, instructions
and unCLIP the same ControlNet is wired by hand: it reads what the UNet reads, and the UNet gets what it says.

The largest difference of the final image, in 0..1, must be at most 1e-3; measured: 1.4e-5.
"""

import dataclasses

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from transformers import CLIPTokenizer

from tests.pipelines import family, live_unclip
from tests.pipelines.family import KINDS, SIZE, compare, picture
from tests.references import disturbed, write_tokenizer
from unclip_jax import ControlNet

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # within diffusers
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),  # there too
    pytest.mark.filterwarnings("ignore:You have passed 2 text prompts:FutureWarning"),  # one image for all
    pytest.mark.filterwarnings("ignore:In CPU autocast"),
]

TOLERANCE = 1e-3
CONTROLLED = {
    "text to image": "StableDiffusionControlNetPipeline",
    "image to image": "StableDiffusionControlNetImg2ImgPipeline",
    "inpainting": "StableDiffusionControlNetInpaintPipeline",
    "inpainting, four channels": "StableDiffusionControlNetInpaintPipeline",
}
HINT, OTHER = picture(SIZE, 7), picture(SIZE, 8)


def reference(unet, seed, **options):
    """diffusers' ControlNet for a UNet, without any parameter that is still zero."""
    widths = {"conditioning_embedding_out_channels": (8, 16), **options}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # As for the published checkpoints, which have four channels whatever their UNet has.
        config = {**unet.config, "in_channels": 4} if unet.config.in_channels != 4 else None
        like = unet if config is None else diffusers.UNet2DConditionModel.from_config(config)
        return disturbed(ControlNetModel.from_unet(like, **widths, load_weights_from_unet=False), seed, size=0.1)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Name of a kind -> the folder of its pipeline, two ControlNets of diffusers, and ours of the same."""
    made = {}

    def of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("controlled")
            theirs, ours = family.open_both(KINDS[name], family.build(KINDS[name], folder))
            nets = [reference(theirs.unet, seed) for seed in (1, 2)]
            for number, net in enumerate(nets):
                net.save_pretrained(folder / f"net-{number}")
            own = [ControlNet.from_pretrained(folder / f"net-{n}", ours.dtype, ours.mesh) for n in range(2)]
            made[name] = theirs, ours, nets, own
        return made[name]

    return of


def controlled(name, theirs, net):
    """diffusers' pipeline with a ControlNet or several, called as ours is."""
    cls = getattr(diffusers, CONTROLLED[name])

    class Called(cls):
        def __call__(self, *, controlnet, control_image, **given):
            return super().__call__(**{"image" if name == "text to image" else "control_image": control_image}, **given)

    Called.__module__, Called.__name__ = cls.__module__, cls.__name__
    extra = {"requires_safety_checker": False}
    pipe = Called(**theirs.components, controlnet=net, **extra)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def error(opened, name, scheduler="ddim", steps=6, several=False, **settings):
    theirs, ours, nets, own = opened(name)
    kind = dataclasses.replace(KINDS[name], theirs=CONTROLLED[name])
    pipe = controlled(name, theirs, nets if several else nets[0])
    given = {"controlnet": own if several else own[0], "control_image": [HINT, OTHER] if several else HINT}
    apart, wanted = compare(kind, pipe, ours, scheduler, steps, **{**given, **settings})
    assert wanted.std() > 0.02
    return apart


@pytest.mark.parametrize(("name", "guess_mode"), [*((name, False) for name in CONTROLLED), ("inpainting", True)])
def test_every_pipeline(name, guess_mode, opened):
    assert error(opened, name, guess_mode=guess_mode) <= TOLERANCE


@pytest.mark.parametrize("scheduler", ["dpm++2m-karras", "heun"])
def test_schedulers_and_windows(scheduler, opened):
    """Windows count network evaluations, of which some solvers have more than steps."""
    window = {"control_guidance_start": 0.2, "control_guidance_end": 0.7, "controlnet_conditioning_scale": 0.8}
    assert error(opened, "text to image", scheduler, 7, **window) <= TOLERANCE


def test_several(opened):
    lists = {
        "controlnet_conditioning_scale": [0.9, 0.4],
        "control_guidance_start": [0.0, 0.3],
        "control_guidance_end": [0.5, 1.0],
    }
    assert error(opened, "image to image", several=True, **lists) <= TOLERANCE


def test_without_guidance(opened):
    assert error(opened, "text to image", guidance_scale=1.0, guess_mode=True) <= TOLERANCE


def test_residuals_pooled_and_colours_in_another_order(opened, tmp_path):
    """As ControlNets for the contents of another image ("shuffle") have them; these are always in guess mode."""
    theirs, ours, *_ = opened("text to image")
    net = reference(theirs.unet, 3, controlnet_conditioning_channel_order="bgr")
    net.register_to_config(global_pool_conditions=True)
    net.save_pretrained(tmp_path)
    kind = dataclasses.replace(KINDS["text to image"], theirs=CONTROLLED["text to image"])
    given = {"controlnet": ControlNet.from_pretrained(tmp_path, ours.dtype, ours.mesh), "control_image": HINT}
    assert compare(kind, controlled("text to image", theirs, net), ours, "ddim", 5, **given)[0] <= TOLERANCE


def wired(monkeypatch, unet, net, hint, scale):
    """The UNet with a ControlNet at its side, for pipelines that know none."""
    plain = unet.forward
    pixels = torch.from_numpy(np.moveaxis(np.asarray(hint, np.float32) / 255, -1, 0))[None]

    def forward(sample, timestep, *, encoder_hidden_states, class_labels=None, **options):
        down, middle = net(
            sample[:, :4],
            timestep,
            encoder_hidden_states,
            pixels.expand(len(sample), -1, -1, -1),
            scale,
            class_labels=class_labels if net.class_embedding is not None else None,
            return_dict=False,
        )
        added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        kept = {"encoder_hidden_states": encoder_hidden_states, "class_labels": class_labels}
        return plain(sample, timestep, **kept, **added, **options)

    monkeypatch.setattr(unet, "forward", forward)


@pytest.mark.parametrize("name", ["depth to image", "instruction"])
def test_an_image_among_the_channels(name, opened, monkeypatch):
    theirs, ours, nets, own = opened(name)
    wired(monkeypatch, theirs.unet, nets[0], HINT, 0.8)
    call = type(theirs).__call__
    drop = ("controlnet", "control_image", "controlnet_conditioning_scale")
    monkeypatch.setattr(
        type(theirs), "__call__", lambda self, **given: call(self, **{k: v for k, v in given.items() if k not in drop})
    )
    given = {"controlnet": own[0], "control_image": HINT, "controlnet_conditioning_scale": 0.8}
    apart, wanted = compare(KINDS[name], theirs, ours, "ddim", 7, **given)
    assert wanted.std() > 0.02
    assert apart <= TOLERANCE


@pytest.mark.parametrize("labelled", [True, False])
def test_variations(labelled, tmp_path, monkeypatch):
    """Of a ControlNet that gets the image's labels as the UNet does, and of one that was made for the base."""
    tokenizer = CLIPTokenizer.from_pretrained(write_tokenizer(tmp_path / "tokenizer"))
    live_unclip.build("h", tokenizer).save_pretrained(tmp_path / "model")
    theirs, ours = live_unclip.open_theirs(tmp_path / "model"), live_unclip.open_ours(tmp_path / "model")
    base = theirs.unet
    if not labelled:
        bare = {**base.config, "class_embed_type": None, "projection_class_embeddings_input_dim": None}
        base = diffusers.UNet2DConditionModel.from_config(bare)
    net = reference(base, 4)
    net.save_pretrained(tmp_path / "net")
    wired(monkeypatch, theirs.unet, net, HINT, 0.7)
    control = ControlNet.from_pretrained(tmp_path / "net", ours.dtype, ours.mesh)
    call, photo = type(ours).__call__, live_unclip.photo(2)
    controls = {"controlnet": control, "control_image": HINT, "controlnet_conditioning_scale": 0.7}
    monkeypatch.setattr(type(ours), "__call__", lambda self, **given: call(self, **controls, **given))
    settings = {"image": photo, "prompt": "a cat", "num_inference_steps": 5, "guidance_scale": 6.0, "noise_level": 100}
    wanted, made = live_unclip.both(monkeypatch, theirs, ours, scheduler="ddim", repeats=2, **settings)
    assert wanted.std() > 0.02
    assert np.abs(wanted - made).max() <= TOLERANCE
