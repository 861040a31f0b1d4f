"""Lotus, whose pipelines are in a repository of their own: its wiring written out with diffusers' networks."""

import json

import diffusers
import jax
import numpy as np
import pytest
import torch

import unclip_jax
from tests.pipelines import family
from tests.references import disturbed
from unclip_jax.distributed.mesh import local_mesh

pytestmark = pytest.mark.parity
LABELS = torch.cat([f(torch.tensor([[1.0, 0.0]])) for f in (torch.sin, torch.cos)], dim=-1)


@torch.no_grad()
def expected(parts, pixels, latents):
    """(1, 3, H, W) in -1..1 -> what the VAE gives of the UNet's prediction."""
    tokens = parts.tokenizer("", padding="do_not_pad", return_tensors="pt").input_ids
    scale = parts.vae.config.scaling_factor
    x = parts.vae.encode(pixels).latent_dist.mode() * scale
    x = x if latents is None else torch.cat([x, latents], dim=1)
    made = parts.unet(x, 999, encoder_hidden_states=parts.text_encoder(tokens)[0], class_labels=LABELS).sample
    return parts.vae.decode(made / scale).sample


@pytest.mark.parametrize("task", ["depth", "normal"])
@pytest.mark.parametrize("channels", [4, 8], ids=["the image alone", "with noise"])
def test_maps(task, channels, tmp_path):
    """Measured: 2e-6 for depth, 3e-6 for normals."""
    saved = family.build(family.Kind("StableDiffusionPipeline", "", channels), tmp_path / f"lotus-{task}")
    parts = diffusers.StableDiffusionPipeline.from_pretrained(saved)
    told = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 4}
    torch.manual_seed(1)
    parts.unet = disturbed(diffusers.UNet2DConditionModel.from_config({**parts.unet.config, **told})).eval()
    parts.unet.save_pretrained(saved / "unet")
    index = json.loads((saved / "model_index.json").read_text())
    name = {"_class_name": "DirectDiffusionY0Pipeline", "_name_or_path": f"jingheya/lotus-{task}-v2-1"}
    (saved / "model_index.json").write_text(json.dumps({**index, **name}))
    ours = unclip_jax.from_pretrained(saved, "float32", local_mesh(jax.local_devices()[:1]))
    ours.progress = False
    rng = np.random.default_rng(0)
    image = rng.uniform(0, 1, (21, 26, 3)).astype(np.float32)
    latents = rng.standard_normal((1, 10, 13, 4)).astype(np.float32) if channels == 8 else None
    given = None if latents is None else torch.from_numpy(latents.transpose(0, 3, 1, 2))
    values = expected(parts, torch.from_numpy(image.transpose(2, 0, 1)[None] * 2 - 1), given)[0].clamp(-1, 1)
    made = ours(image, latents=latents, processing_resolution=0, match_input_resolution=False).prediction[0]
    if task == "depth":
        wanted = (values / 2 + 0.5).mean(0)[..., None]
    else:
        wanted = (values / values.norm(dim=0).clamp(min=1e-6)).permute(1, 2, 0)
    np.testing.assert_allclose(made, wanted.numpy(), atol=1e-4)
    assert made.std() > 0.05
