"""Prompts through a prior to images, from one folder that diffusers saved, against its own StableUnCLIPPipeline.

The largest difference of the final image, in 0..1, must be at most 1e-3.
"""

import diffusers.pipelines.stable_diffusion.pipeline_stable_unclip as reference_module
import diffusers.schedulers.scheduling_ddpm as ddpm_module
import jax
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    PNDMScheduler,
    PriorTransformer,
    StableUnCLIPPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import unclip_jax
from convert.export.tokenizer import tokenizer_files
from tests.references import disturbed, write_tokenizer
from unclip_jax.conditioning.tokenizer import Tokenizer, openai_tokenizer_json
from unclip_jax.distributed.mesh import local_mesh
from unclip_jax.sampling.solvers import PUBLISHED_UNCLIP_SCHEDULER

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # within diffusers
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),  # there too
]

TOLERANCE = 1e-3
WIDTH = 24
PROMPTS = ["a red fox!", "two dogs, and a naïve café  №5"]
KARLO = {"prediction_type": "sample", "clip_sample_range": 5.0, "beta_schedule": "squaredcos_cap_v2"}


@torch.no_grad()
def build(folder):
    torch.manual_seed(0)
    prior = PriorTransformer(num_attention_heads=4, attention_head_dim=12, num_layers=2, embedding_dim=WIDTH)
    prior.clip_std += 1
    normalizer = StableUnCLIPImageNormalizer(embedding_dim=WIDTH)
    normalizer.mean.data += 0.3 * torch.randn_like(normalizer.mean)
    normalizer.std.data += torch.rand_like(normalizer.std)
    tower = {"intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 49408}
    seen = CLIPTextConfig(
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        bos_token_id=49406,
        eos_token_id=49407,
        hidden_act="quick_gelu",
        **tower,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        attention_head_dim=(2, 4),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=2 * WIDTH,
        use_linear_projection=True,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    )
    openai = folder / "openai"
    openai.mkdir()
    for name, content in tokenizer_files(Tokenizer.from_json(openai_tokenizer_json(), "open_clip")).items():
        (openai / name).write_text(content, "utf-8")
    pipe = StableUnCLIPPipeline(
        prior_tokenizer=CLIPTokenizer.from_pretrained(openai),
        prior_text_encoder=disturbed(CLIPTextModelWithProjection(seen)),
        prior=disturbed(prior, size=0.1),
        prior_scheduler=DDPMScheduler(variance_type="fixed_small_log", **KARLO),
        image_normalizer=normalizer,
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=CLIPTokenizer.from_pretrained(write_tokenizer(folder / "tokenizer")),
        text_encoder=disturbed(CLIPTextModel(CLIPTextConfig(hidden_size=32, eos_token_id=2, **tower))),
        unet=disturbed(unet),
        scheduler=PNDMScheduler.from_config(PUBLISHED_UNCLIP_SCHEDULER),
        vae=disturbed(vae),
    )
    pipe.save_pretrained(folder / "saved")
    return folder / "saved"


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """diffusers' pipeline and ours, from one folder."""
    folder = build(tmp_path_factory.mktemp("stable"))
    theirs = StableUnCLIPPipeline.from_pretrained(folder).to(torch.float32)
    theirs.set_progress_bar_config(disable=True)
    ours = unclip_jax.from_pretrained(folder, "float32", local_mesh(jax.local_devices()[:1]))
    assert isinstance(ours, unclip_jax.StableUnCLIPPipeline)
    ours.prior.progress = ours.progress = False
    return theirs, ours


@pytest.mark.parametrize(("scheduler", "noise_level", "prior_steps"), [("pndm", 0, 25), ("ddim", 300, 6)])
def test_final_images(both, scheduler, noise_level, prior_steps, monkeypatch):
    """Measured: 2e-5."""
    theirs, ours = both
    rng = np.random.default_rng(prior_steps)
    repeats = 2
    batch = repeats * len(PROMPTS)
    noise = {
        "prior_latents": rng.standard_normal((batch, WIDTH), np.float32),
        "latents": rng.standard_normal((batch, 16, 16, 4), np.float32),
    }
    image_noise = rng.standard_normal((batch, WIDTH), np.float32)
    step_noise = rng.standard_normal((prior_steps, batch, WIDTH), np.float32)
    settings = {
        "prompt": PROMPTS,
        "negative_prompt": ["blurry; ugly!!"] * 2,
        "num_inference_steps": 8,
        "guidance_scale": 6.0,
        "num_images_per_prompt": repeats,
        "noise_level": noise_level,
        "prior_num_inference_steps": prior_steps,
        "prior_guidance_scale": 4.0,
        "height": 32,
        "width": 32,
        "output_type": "np",
    }
    draws = iter(step_noise)
    monkeypatch.setattr(ddpm_module, "randn_tensor", lambda shape, **options: torch.from_numpy(next(draws)))
    monkeypatch.setattr(reference_module, "randn_tensor", lambda shape, **options: torch.from_numpy(image_noise))
    kind = {"pndm": PNDMScheduler, "ddim": DDIMScheduler}[scheduler]
    theirs.scheduler = kind.from_config(theirs.scheduler.config)
    in_torch = {
        "prior_latents": torch.from_numpy(noise["prior_latents"]),
        "latents": torch.from_numpy(np.ascontiguousarray(np.moveaxis(noise["latents"], -1, 1))),
    }
    wanted = theirs(**settings, **in_torch).images
    made = ours(**settings, **noise, image_noise=image_noise, prior_step_noise=step_noise, scheduler=scheduler).images
    assert wanted.std() > 0.02  # an image, and not a flat one
    assert ((wanted > 0) & (wanted < 1)).mean() > 0.3  # most of it not clipped
    assert np.abs(wanted[0] - wanted[-1]).max() > 0.02
    assert np.abs(made - wanted).max() <= TOLERANCE
