"""Small random pipelines of the family as diffusers saves them, and runs of both sides from the same noise.

Imports torch: for the live comparisons and for scripts/parity_table.
"""

import contextlib
import dataclasses
import importlib
import itertools
from pathlib import Path
from unittest import mock

import diffusers
import jax
import numpy as np
import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, DPTImageProcessor

import unclip_jax
from tests.models.comparisons import TINY_DEPTH, depth_reference
from tests.references import disturbed, write_tokenizer
from unclip_jax.distributed.mesh import local_mesh
from unclip_jax.models.configs import AutoencoderTinyConfig
from unclip_jax.sampling.solvers import PUBLISHED_UNCLIP_SCHEDULER, first_step, make_solver

KARRAS, EXPONENTIAL, BETA = ({f"use_{name}_sigmas": True} for name in ("karras", "exponential", "beta"))
TRAILING = {"timestep_spacing": "trailing"}
# Our name -> diffusers' class, and what its configuration is changed to.
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-karras": ("EulerDiscreteScheduler", KARRAS),
    "euler-sgm-uniform": ("EulerDiscreteScheduler", TRAILING),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "heun-exponential": ("HeunDiscreteScheduler", EXPONENTIAL),
    "lms": ("LMSDiscreteScheduler", {}),
    "lms-beta": ("LMSDiscreteScheduler", BETA),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2-a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++2m-karras": ("DPMSolverMultistepScheduler", KARRAS),
    "dpm++2m-lu": ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
    "dpm++2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++2m-sde-karras": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", **KARRAS}),
    "dpm++2s": ("DPMSolverSinglestepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "unipc-karras": ("UniPCMultistepScheduler", KARRAS),
    "deis": ("DEISMultistepScheduler", {}),
    "deis-karras": ("DEISMultistepScheduler", KARRAS),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """theirs, ours: the pipelines' classes. channels, classes: of the UNet. begins: with an image, by its strength."""

    theirs: str
    ours: str
    channels: int = 4
    begins: bool = False
    prediction_type: str = "epsilon"


KINDS = {
    "text to image": Kind("StableDiffusionPipeline", "TextToImagePipeline"),
    "text to image, v": Kind("StableDiffusionPipeline", "TextToImagePipeline", prediction_type="v_prediction"),
    "image to image": Kind("StableDiffusionImg2ImgPipeline", "ImageToImagePipeline", begins=True),
    "depth to image": Kind("StableDiffusionDepth2ImgPipeline", "DepthToImagePipeline", 5, begins=True),
    "inpainting": Kind("StableDiffusionInpaintPipeline", "InpaintPipeline", 9),
    "inpainting, from the image": Kind("StableDiffusionInpaintPipeline", "InpaintPipeline", 9, begins=True),
    "inpainting, four channels": Kind("StableDiffusionInpaintPipeline", "InpaintPipeline"),
    "upscaling": Kind("StableDiffusionUpscalePipeline", "UpscalePipeline", 7, prediction_type="v_prediction"),
    "instruction": Kind("StableDiffusionInstructPix2PixPipeline", "InstructPipeline", 8),
}
STRENGTH = 0.6
SIZE = 32  # pixels; the latents' half, and for the upscaler its small image's


def build(kind, folder, scheduler="PNDMScheduler", **settings):
    """diffusers' pipeline with random weights, saved into a folder. settings: of its scheduler."""
    torch.manual_seed(0)
    upscales = kind.channels == 7
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=kind.channels,
        block_out_channels=(32, 64),
        attention_head_dim=(2, 4),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        num_class_embeds=1000 if upscales else None,
        use_linear_projection=True,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        scaling_factor=0.08333 if upscales else 0.18215,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=32,
            vocab_size=49408,
            eos_token_id=2,
            hidden_act="gelu",
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )
    parts = {
        "unet": disturbed(unet),
        "vae": disturbed(vae),
        "text_encoder": disturbed(text),
        "tokenizer": CLIPTokenizer.from_pretrained(write_tokenizer(Path(folder) / "tokenizer-source")),
        "scheduler": getattr(diffusers, scheduler).from_config(
            {**PUBLISHED_UNCLIP_SCHEDULER, "prediction_type": kind.prediction_type, **settings}
        ),
    }
    if upscales:
        parts["low_res_scheduler"] = diffusers.DDPMScheduler(beta_schedule="scaled_linear")
    elif kind.channels == 5:
        depth = disturbed(depth_reference(TINY_DEPTH), size=0.1)
        with torch.no_grad():
            depth.head.head[-2].bias.fill_(100.0)  # the last ReLU would hide most of what random weights make
        parts["depth_estimator"] = depth
        side = {"height": TINY_DEPTH.image_size, "width": TINY_DEPTH.image_size}
        parts["feature_extractor"] = DPTImageProcessor(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    else:
        parts |= {"safety_checker": None, "feature_extractor": None}
    extra = {"requires_safety_checker": False} if "safety_checker" in parts else {}
    pipe = getattr(diffusers, kind.theirs)(**parts, **extra)
    pipe.save_pretrained(Path(folder) / "saved")
    return Path(folder) / "saved"


def open_both(kind, folder):
    """diffusers' pipeline and ours, from one folder."""
    theirs = getattr(diffusers, kind.theirs).from_pretrained(folder).to(torch.float32)
    theirs.set_progress_bar_config(disable=True)
    mesh = local_mesh(jax.local_devices()[:1])
    ours = getattr(unclip_jax, kind.ours).from_pretrained(folder, "float32", mesh)
    ours.progress = False
    return theirs, ours


def picture(size, seed=0):
    """Noise with large patches, so that resizing does not wash it out."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def hole(size):
    mask = np.zeros((size, size), np.uint8)
    mask[size // 4 : 3 * size // 4, size // 8 : size // 2] = 255
    return Image.fromarray(mask)


def compare(kind, theirs, ours, scheduler, steps, *, guidance_scale=5.0, repeats=2, **settings):
    """The largest difference of the final images, in 0..1 (or latents, as `output_type` says), and diffusers' own.

    scheduler: one of `SCHEDULERS`, in the place of the folder's own; None for that.
    """
    rng = np.random.default_rng(steps)
    side = SIZE if kind.channels == 7 else SIZE // 2
    shape = (repeats, side, side, 4)
    strength = STRENGTH if kind.begins else None
    name = ours.config.scheduler if scheduler is None else scheduler
    start_step = first_step(name, steps, strength) if kind.begins else 0
    eta = settings.get("eta", 0.0)
    solver = make_solver(name, ours.config.scheduler_config, steps, eta, start_step, own=scheduler is None)
    start = rng.standard_normal(shape, np.float32)
    # An image is encoded, or noised, once there for all that is made of it.
    encoding = np.repeat(rng.standard_normal((2, 1, *shape[1:]), np.float32), repeats, axis=1)
    low_res = np.repeat(rng.standard_normal((1, side, side, 3), np.float32), repeats, axis=0)
    step_noise = rng.standard_normal((solver.calls, *shape), np.float32)

    given = {"image": picture(SIZE)} if "text" not in ours.__class__.__name__.lower() else {}
    if "Inpaint" in kind.ours:
        given["mask_image"] = hole(SIZE)
    common = {
        "prompt": "Two cats, 3 dogs & a café!",
        "negative_prompt": "blurry; ugly!!",
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "num_images_per_prompt": repeats,
        "output_type": "np",
        **settings,
        **given,
    }
    sized = {} if kind.channels in (5, 7, 8) or "Img2Img" in kind.theirs else {"height": SIZE, "width": SIZE}

    if scheduler is not None:
        class_name, changes = SCHEDULERS[scheduler]
        changes = {"clip_sample": False, "thresholding": False, **changes}  # ours never limits x0 then
        theirs.scheduler = getattr(diffusers, class_name).from_config(dict(ours.config.scheduler_config), **changes)
    reference = theirs.scheduler
    drawn = [noise for noise, weight in zip(step_noise, solver.grid.get("noise", ()), strict=False) if weight]
    steps_of_theirs = itertools.chain(drawn, itertools.repeat(np.zeros(shape, np.float32)))
    # What each module draws, in order.
    queues = {
        reference.__class__.__module__: map(torch_order, steps_of_theirs),
        "diffusers.models.autoencoders.vae": itertools.cycle(map(torch_order, encoding)),
        theirs.__class__.__module__: iter(map(torch_order, [low_res, start] if kind.channels == 7 else [start])),
    }
    if kind.channels == 9 and not kind.begins:  # the image itself is not encoded
        queues["diffusers.models.autoencoders.vae"] = itertools.repeat(torch_order(encoding[1]))
    start_strength = {"strength": STRENGTH} if kind.begins else {}
    draws_latents = kind.theirs == "StableDiffusionPipeline"
    with contextlib.ExitStack() as stack:
        for name, queue in queues.items():
            module = importlib.import_module(name)
            if hasattr(module, "randn_tensor"):
                stack.enter_context(mock.patch.object(module, "randn_tensor", _draw(queue)))
        latents = {"latents": torch_order(start)} if draws_latents else {}
        wanted = theirs(**common, **sized, **start_strength, **latents).images

    noise = {"noise" if kind.begins else "latents": start}
    draws = not isinstance(ours.config.vae, AutoencoderTinyConfig)  # of whose latents nothing is drawn
    if "image" in given and kind.channels not in (7, 8) and draws:
        one = encoding[1] if kind.channels == 9 and not kind.begins else encoding[0]
        noise["posterior_noise"] = encoding if kind.channels == 9 and kind.begins else one
    if kind.channels == 7:
        noise["low_res_noise"] = low_res
    if solver.stochastic:
        noise["step_noise"] = step_noise
    made = ours(**common, **sized, **start_strength, scheduler=scheduler, **noise).images
    if isinstance(wanted, torch.Tensor):
        wanted = np.moveaxis(wanted.numpy(), 1, -1)
    return float(np.abs(made - wanted).max()), wanted


def _draw(queue):
    def randn_tensor(shape, **options):
        return next(queue)[: shape[0]]

    return randn_tensor


def torch_order(array):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))
