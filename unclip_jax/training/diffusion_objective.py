"""The training objective of a denoiser: what the UNet is given for a batch of images, and each image's loss.

The networks that encode images and texts (the VAE and the towers) are frozen. Their outputs can therefore be computed
once (`encode`, then `unclip_jax.training.cache`) or in every step; a batch holds either the images or those outputs.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from unclip_jax.checkpoints.networks import Network
from unclip_jax.models.controlnet import ControlNetModel
from unclip_jax.models.posterior import posterior
from unclip_jax.models.resize import resize_bicubic
from unclip_jax.sampling.schedule import PREDICTION_TYPES, add_noise
from unclip_jax.training.controlnet import controlled
from unclip_jax.training.objectives import denoising_losses, image_conditioning, offset_noise
from unclip_jax.training.rng import draw_step, step_keys

# What `encode` makes of a batch.
ENCODED = (
    "moments",
    "context",
    "image_embeds",
    "depth_map",
    "masked_moments",
    "mask",
    "low_res",
    "hint",
    "original_moments",
)


@dataclasses.dataclass(frozen=True)
class DiffusionObjective:
    """The objective of a denoiser.

    Args:
        prediction_type: "epsilon", "v_prediction" or "sample".
        scaling_factor: The VAE's.
        embedding_dropout: The share of images whose whole image condition is dropped; 0.25 in the original.
        text_dropout: The share that gets the empty prompt; 0.1 in most runs of the model card. Where an instruction
            changes an image, as many lose that image, and half of them both; so 0.1 is InstructPix2Pix's, too.
        clean_share: The share of the others whose image condition is at level 0. The rest have levels 0..999 evenly, as
            all have in the original.
        min_snr_gamma: See `unclip_jax.training.objectives`; None leaves it out.
        noise_offset: See `unclip_jax.training.objectives`; 0 leaves it out.
        max_low_res_level: An upscaler's small image is noised to a level below this; 350 in the original.
        estimates: Whether the image is a map of another, "original", as an estimator makes it: always with the empty
            prompt, and with the original's latents, scaled, before its own.

    Raises:
        ValueError: A value is out of range.
    """

    prediction_type: str
    scaling_factor: float
    embedding_dropout: float = 0.25
    text_dropout: float = 0.1
    clean_share: float = 0.0
    min_snr_gamma: float | None = None
    noise_offset: float = 0.0
    max_low_res_level: int = 350
    estimates: bool = False

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type is {self.prediction_type!r}; accepted: {', '.join(PREDICTION_TYPES)}")
        for name in ("embedding_dropout", "text_dropout", "clean_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; want a share between 0 and 1")


def encode(networks: Mapping[str, Network], frozen: Mapping[str, Any], batch: Mapping[str, Any]) -> dict[str, Any]:
    """Runs the frozen networks on a batch: those of `ENCODED` for which it has an input.

    Args:
        networks: Of "vae", "text_encoder", "image_encoder" those that the batch needs.
        frozen: Their parameters, under these names.
        batch: "image" (B, H, W, 3) in -1..1; "tokens" (B, T) int32; "pixel_values" (B, S, S, 3) for the image encoder;
            "mask" (B, H, W, 1) with 1 where an inpainting model repaints; "depth_image" (B, H', W', 3) in -1..1, for
            the depth estimator; "original" (B, H, W, 3) in -1..1, what an instruction makes the image of. Entries of
            `ENCODED` are kept.

    Returns:
        The entries of `ENCODED`.
    """
    encoded = {name: value for name, value in batch.items() if name in ENCODED}

    def network(name: str) -> Any:
        return networks[name].merge(frozen[name])

    if "image" in batch:
        vae = network("vae")
        encoded["moments"] = vae.moments(batch["image"])
        if "mask" in batch:
            encoded["masked_moments"] = vae.moments(batch["image"] * (batch["mask"] < 0.5))
            factor = batch["mask"].shape[1] // encoded["moments"].shape[1]
            encoded["mask"] = batch["mask"][:, ::factor, ::factor]  # to the nearest, as the original resizes masks
    if "original" in batch:
        encoded["original_moments"] = network("vae").moments(batch["original"])
    if "depth_image" in batch:
        depth = network("depth_estimator")(batch["depth_image"])[..., None]
        encoded["depth_map"] = normalised_depth(resize_bicubic(depth, *encoded["moments"].shape[1:3]))
    if "tokens" in batch:
        encoded["context"] = network("text_encoder")(batch["tokens"])
    if "pixel_values" in batch:
        encoded["image_embeds"] = network("image_encoder")(batch["pixel_values"])
    return encoded


def normalised_depth(depth: jax.Array) -> jax.Array:
    """Stretches relative inverse depth of any range to -1..1, each map on its own.

    A constant map becomes -1 everywhere. Source: the original's training, which adds 0.001 to the range.

    Args:
        depth: (B, h, w, 1).

    Returns:
        (B, h, w, 1).
    """
    least, most = (f(depth, axis=(1, 2, 3), keepdims=True) for f in (jnp.min, jnp.max))
    return 2 * (depth - least) / (most - least + 0.001) - 1


def losses(
    options: DiffusionObjective,
    unet: Network,
    seed: int,
    frozen: Mapping[str, Any],
    params: Mapping[str, Any],
    encoded: Mapping[str, Any],
    step: jax.Array,
    controlnet: ControlNetModel | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Each image's loss, (B,), and the metrics to report; see `unclip_jax.training.step.Losses`.

    Args:
        options: The objective.
        unet: The UNet.
        seed: The run's seed.
        frozen: "alphas_cumprod" (N,), the diffusion's; "empty_context" (1, T, W), the empty prompt's states; with an
            image condition "noising", with "alphas_cumprod", "mean" and "std" as in `noise_image_embeddings`; for an
            upscaler "low_res_alphas_cumprod" (N'',).
        params: All of the UNet's parameters.
        encoded: From `encode`.
        step: The step's number.
        controlnet: What reads the "hint" of the batch, (B, H, W, 3) in 0..1; None for none.

    Returns:
        Losses (B,), and metrics by name.
    """
    moments = encoded["moments"]
    embeds = encoded.get("image_embeds")
    count, latent_shape = moments.shape[0], (*moments.shape[1:3], moments.shape[3] // 2)
    draws = draw_step(
        step_keys(seed, step, jnp.arange(count)),
        latent_shape,
        0 if embeds is None else embeds.shape[-1],
        train_timesteps=len(frozen["alphas_cumprod"]),
        embedding_dropout=options.embedding_dropout,
        text_dropout=options.text_dropout,
    )
    x0 = options.scaling_factor * posterior(moments).sample(draws.posterior_noise)
    noise = offset_noise(draws.noise, draws.offset, options.noise_offset) if options.noise_offset else draws.noise
    keep_text = draws.keep_text[:, None, None]
    empty = frozen["empty_context"]
    if options.estimates:
        context = jnp.broadcast_to(empty, (count, *empty.shape[1:]))
    else:
        context = jnp.where(keep_text, encoded["context"], empty)
    class_labels = None
    if embeds is not None:
        levels = _levels(draws.levels, options.clean_share)
        class_labels = image_conditioning(embeds, levels, draws.embedding_noise, draws.keep_image, **frozen["noising"])
    added = None
    if "low_res" in encoded:
        table = jnp.asarray(frozen["low_res_alphas_cumprod"])
        class_labels = draws.levels * options.max_low_res_level // 1000
        added = add_noise(encoded["low_res"], draws.low_res_noise, table[class_labels])
    elif "masked_moments" in encoded:
        masked = options.scaling_factor * posterior(encoded["masked_moments"]).sample(draws.masked_noise)
        added = jnp.concatenate([encoded["mask"], masked], axis=-1)
    elif "depth_map" in encoded:
        added = encoded["depth_map"]
    elif options.estimates:
        added = options.scaling_factor * posterior(encoded["original_moments"]).mean
    elif "original_moments" in encoded:  # as the pipeline reads it: the mode, without the VAE's factor
        added = jnp.where(draws.keep_original[:, None, None, None], posterior(encoded["original_moments"]).mean, 0)
    model = unet.merge(params)
    each = denoising_losses(
        model if controlnet is None else controlled(model, controlnet, encoded["hint"]),
        x0,
        noise,
        draws.timesteps,
        context,
        class_labels,
        alphas_cumprod=frozen["alphas_cumprod"],
        prediction_type=options.prediction_type,
        min_snr_gamma=options.min_snr_gamma,
        added_channels=added,
        added_first=options.estimates,
    )
    return each, {}


def _levels(levels: jax.Array, clean_share: float) -> jax.Array:
    """Even levels 0..999 with a share of them moved to 0; the others remain even over the whole range."""
    if not clean_share:
        return levels
    first = round(1000 * clean_share)
    return jnp.maximum(levels - first, 0) * 1000 // max(1000 - first, 1)
