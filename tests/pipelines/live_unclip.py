"""diffusers' unCLIP pipeline with small networks of random weights."""

import torch
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableUnCLIPImg2ImgPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from tests.references import disturbed
from unclip_jax.sampling.solvers import PUBLISHED_UNCLIP_SCHEDULER

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
