"""diffusers' unCLIP pipeline with small networks of random weights."""

import sys

import diffusers.pipelines.stable_diffusion.pipeline_stable_unclip_img2img as reference_module
import jax
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
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
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from tests.references import disturbed
from unclip_jax import UnCLIPPipeline
from unclip_jax.distributed.mesh import local_mesh
from unclip_jax.sampling.solvers import PUBLISHED_UNCLIP_SCHEDULER, make_solver

# The two published forms, small: activations of the towers, statistics, widths.
FORMS = {
    "h": {"activation": "gelu", "width": 32, "statistics": False},
    "l": {"activation": "quick_gelu", "width": 24, "statistics": True},
}


def build(form, tokenizer):
    torch.manual_seed(0)
    activation, width, statistics = FORMS[form].values()
    towers = {"hidden_act": activation, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2}
    normalizer = StableUnCLIPImageNormalizer(embedding_dim=width)
    if statistics:
        normalizer.mean.data += 0.3 * torch.randn_like(normalizer.mean)
        normalizer.std.data += torch.rand_like(normalizer.std)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 64),
        attention_head_dim=(2, 4, 4),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=2 * width,
        use_linear_projection=True,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    )
    text = CLIPTextModel(CLIPTextConfig(hidden_size=32, vocab_size=49408, eos_token_id=2, **towers))
    vision = CLIPVisionModelWithProjection(
        CLIPVisionConfig(hidden_size=48, image_size=56, patch_size=14, projection_dim=width, **towers)
    )
    return StableUnCLIPImg2ImgPipeline(
        unet=disturbed(unet),
        vae=disturbed(vae),
        text_encoder=disturbed(text),
        image_encoder=disturbed(vision),
        image_normalizer=normalizer,
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        scheduler=PNDMScheduler.from_config(PUBLISHED_UNCLIP_SCHEDULER),
        tokenizer=tokenizer,
        feature_extractor=CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
    )


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
    """The final pictures of diffusers and of ours, (B, H, W, 3) each (or latents), from the same noise.

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
