"""Guidance live against diffusers: its formulas, and whole runs of its pipeline with perturbed attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPAGPipeline, UNet2DConditionModel
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.guiders.guider_utils import rescale_noise_cfg

from convert.rules import unet
from tests.models.comparisons import channels_first, converted, relative_error
from tests.references import disturbed
from unclip_jax.models.configs import UNetConfig
from unclip_jax.sampling import (
    Guidance,
    guidance_rows,
    guidance_state,
    guided,
    make_solver,
    run_stateful_steps,
    start,
)
from unclip_jax.sampling.guidance import project, rescale

pytestmark = pytest.mark.parity

SHAPE = (3, 8, 8, 4)
CONTEXT = (7, 40)
CONFIG = UNetConfig(
    block_out_channels=(32, 64),
    layers_per_block=1,
    attention_levels=(True, True),
    num_heads=(2, 4),
    cross_attention_dim=CONTEXT[1],
    only_cross_attention=(False, False),
)
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
SCHEDULE |= {"steps_offset": 1, "set_alpha_to_one": False}


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def test_rescale():
    """Measured: 5e-7."""
    out, conditional = 5 * normal(0, *SHAPE), normal(1, *SHAPE)
    want = rescale_noise_cfg(torch.from_numpy(out), torch.from_numpy(conditional), 0.7)
    np.testing.assert_allclose(rescale(jnp.asarray(out), jnp.asarray(conditional), jnp.float32(0.7)), want, atol=5e-6)


@pytest.mark.parametrize(("eta", "threshold", "momentum"), [(0.0, 15.0, -0.5), (0.6, 4.0, -0.75), (1.0, 1e9, 0.0)])
def test_projection(eta, threshold, momentum):
    """Three calls of diffusers' function in the paper's formulation, where the scale is ours less one."""
    buffer, average = MomentumBuffer(momentum), jnp.zeros(SHAPE)
    for call in range(3):
        c, u = normal(call, *SHAPE), normal(call + 10, *SHAPE)
        want = normalized_guidance(torch.from_numpy(c), torch.from_numpy(u), 6.5, buffer, eta, threshold, True)
        update, average = project(jnp.asarray(c), jnp.asarray(u), average, eta, threshold, momentum)
        np.testing.assert_allclose(c + 6.5 * update, want, rtol=1e-5, atol=2e-5)  # measured: 6e-6


@pytest.fixture(scope="module")
def unets():
    """diffusers' and ours, with the same weights."""
    reference = UNet2DConditionModel(
        sample_size=SHAPE[1],
        block_out_channels=CONFIG.block_out_channels,
        layers_per_block=CONFIG.layers_per_block,
        attention_head_dim=CONFIG.num_heads,
        cross_attention_dim=CONFIG.cross_attention_dim,
        down_block_types=["CrossAttnDownBlock2D"] * 2,
        up_block_types=["CrossAttnUpBlock2D"] * 2,
        use_linear_projection=True,
    )
    disturbed(reference, size=0.1)
    return reference, converted("unet", CONFIG, lambda t: unet.diffusers(t, "unet/", CONFIG), reference)


@pytest.mark.parametrize(
    ("kind", "scale", "amount", "theirs", "ours"),
    [
        ("v_prediction", 5.0, 0.7, "mid", ("mid",)),
        ("epsilon", 4.0, 0.0, ["down_blocks.1", "up_blocks.0.attentions.1"], ("down.1", "up.0.1")),
        ("epsilon", 0.0, 0.0, ["mid", "down_blocks.0"], ("mid", "down.0")),
    ],
)
def test_pipeline_with_perturbed_attention(unets, kind, scale, amount, theirs, ours):
    """Four DDIM steps of three images; scale 0 is without classifier-free guidance."""
    reference, unet = unets
    steps, pag_scale = 4, 3.0
    pipe = StableDiffusionPAGPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=reference,
        scheduler=DDIMScheduler(**SCHEDULE, prediction_type=kind),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        pag_applied_layers=theirs,
    )
    pipe.set_progress_bar_config(disable=True)
    latents, text, negative = normal(0, *SHAPE), normal(1, SHAPE[0], *CONTEXT), normal(2, SHAPE[0], *CONTEXT)
    want = pipe(
        prompt_embeds=torch.from_numpy(text),
        negative_prompt_embeds=torch.from_numpy(negative),
        latents=channels_first(latents),
        num_inference_steps=steps,
        guidance_scale=scale,
        guidance_rescale=amount,
        pag_scale=pag_scale,
        output_type="latent",
    ).images

    guidance = Guidance(unconditional=scale > 0, perturbed=True, rescaled=amount > 0)
    solver = make_solver("ddim", SCHEDULE | {"prediction_type": kind}, steps, 0.0)
    context = unet.encode_context(guidance_rows(guidance, jnp.asarray(negative), jnp.asarray(text)))

    def network(x, row, perturbed):
        emb = unet.embed_time(jnp.full(x.shape[0], row["timestep"]))
        return unet.denoise(x, emb, context, unet.perturb_attention(perturbed, ours))

    rows = {name: jnp.asarray(column) for name, column in solver.grid.items()}
    for name, value in {"guidance_scale": scale, "pag_scale": pag_scale, "guidance_rescale": amount}.items():
        rows[name] = jnp.full(solver.calls, value, jnp.float32)
    carry = start(solver, jnp.asarray(latents), guidance_state=guidance_state(guidance, latents))
    denoise = guided(network, guidance, kind)
    got = jax.jit(
        lambda carry: run_stateful_steps(denoise, solver, carry, rows, jax.random.split(jax.random.key(0), 3))
    )
    got = np.moveaxis(np.asarray(got(carry).latents), -1, 1)
    assert relative_error(got, want) < 2e-5  # measured: 6e-6, 4e-6, 3e-6
