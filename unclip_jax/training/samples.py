"""Samples of a denoiser in training: a grid of images, each column for one condition."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from unclip_jax.checkpoints.networks import Network
from unclip_jax.conditioning.noise_augmentation import noise_image_embeddings
from unclip_jax.image_files import to_uint8
from unclip_jax.models.posterior import posterior
from unclip_jax.pipelines.arguments import UpscaleArguments
from unclip_jax.pipelines.control import Control, embed_hint
from unclip_jax.pipelines.defaults import default
from unclip_jax.pipelines.denoiser import prepare, unet_denoiser
from unclip_jax.pipelines.instruct_arguments import InstructArguments
from unclip_jax.sampling.guidance import Guidance
from unclip_jax.sampling.loop import run_stateful_steps, start
from unclip_jax.sampling.noise import Branch, draw, image_keys
from unclip_jax.sampling.schedule import add_noise
from unclip_jax.sampling.solvers import Solver

SCALE = "controlnet_conditioning_scale"  # a column of the grid


def sample_latents(
    unet: Network,
    solver: Solver,
    frozen: Mapping[str, Any],
    scaling_factor: float,
    params: Mapping[str, Any],
    encoded: Mapping[str, Any],
    guidance_scale: jax.Array,
    seed: int = 0,
    controlnet: Network | None = None,
    estimates: bool = False,
) -> jax.Array:
    """Samples latents under the conditions of a batch; images condition at noise level 0.

    Args:
        unet: The UNet.
        solver: The solver.
        frozen: As in `unclip_jax.training.diffusion_objective.losses`.
        scaling_factor: The VAE's.
        params: The UNet's parameters.
        encoded: As in `losses`.
        guidance_scale: ().
        seed: The seed.
        controlnet: What reads the "hint" of the batch, with parameters; None for none.
        estimates: As in `DiffusionObjective`; there is no guidance then.

    Returns:
        (B, h, w, C), scaled.
    """
    count = len(encoded["moments"])
    guidance = Guidance(unconditional=not estimates, image="original_moments" in encoded and not estimates)
    shape = (*encoded["moments"].shape[1:3], encoded["moments"].shape[3] // 2)
    keys = image_keys(seed, jnp.arange(count))
    empty = jnp.broadcast_to(frozen["empty_context"], (count, *frozen["empty_context"].shape[1:]))
    labels, channels = None, None
    if (embeds := encoded.get("image_embeds")) is not None:
        noise = draw(keys, Branch.IMAGE, embeds.shape[1:])
        labels = noise_image_embeddings(embeds, jnp.zeros(count, jnp.int32), noise, **frozen["noising"])
    if "low_res" in encoded:
        labels = jnp.full(count, default(UpscaleArguments, "noise_level"), jnp.int32)
        noise = draw(keys, Branch.LOW_RESOLUTION, encoded["low_res"].shape[1:])
        channels = add_noise(encoded["low_res"], noise, frozen["low_res_alphas_cumprod"][labels])
    elif "masked_moments" in encoded:
        masked = scaling_factor * posterior(encoded["masked_moments"]).mean
        channels = jnp.concatenate([encoded["mask"], masked], axis=-1)
    elif "depth_map" in encoded:
        channels = encoded["depth_map"]
    elif "original_moments" in encoded:
        channels = (scaling_factor if estimates else 1) * posterior(encoded["original_moments"]).mean
    context = empty if estimates else encoded["context"]
    controls = []
    if controlnet is not None:
        controls = [Control(controlnet, embed_hint(controlnet, encoded["hint"]), SCALE, guesses=False, graded=False)]
    constants = prepare(unet, params, context, empty, labels, channels, controls=controls, guidance=guidance)
    denoise = unet_denoiser(
        unet, params, constants, guidance, solver.prediction_type, controls=controls, image_first=estimates
    )
    rows = {name: jnp.asarray(column) for name, column in solver.grid.items()}
    rows[SCALE] = jnp.ones((solver.calls, count))
    rows["guidance_scale"] = jnp.broadcast_to(guidance_scale, (solver.calls,))
    rows["image_guidance_scale"] = jnp.full(solver.calls, default(InstructArguments, "image_guidance_scale"))
    carry = start(solver, draw(keys, Branch.LATENTS, shape))
    return run_stateful_steps(denoise, solver, carry, rows, keys).latents


def grid(rows: list[np.ndarray]) -> Image.Image:
    """Rows of images, each (B, H, W, 3) in -1..1, one row below the other."""
    lines = [np.concatenate(list(row / 2 + 0.5), axis=1) for row in rows]
    return Image.fromarray(to_uint8(np.concatenate(lines, axis=0), "round"))
