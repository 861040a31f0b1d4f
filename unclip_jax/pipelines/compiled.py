"""The compiled programs of a pipeline: pure functions of weights and arrays, each compiled once a shape."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.checkpoints.networks import Network
from unclip_jax.conditioning.depth import depth_condition
from unclip_jax.conditioning.latents import latents_from_moments
from unclip_jax.conditioning.noise_augmentation import mix_conditions, noise_image_embeddings
from unclip_jax.conditioning.upscale import noise_low_res
from unclip_jax.models.freeu import FreeU
from unclip_jax.models.tiling import decode_tiled
from unclip_jax.pipelines.memory import Memory
from unclip_jax.sampling.guidance import Guidance, guidance_rows, guidance_state, guided
from unclip_jax.sampling.loop import Carry, run_stateful_steps, start
from unclip_jax.sampling.noise import Branch, draw, image_keys
from unclip_jax.sampling.solvers import Solver
from unclip_jax.sampling.tiled import tiled


class Known(NamedTuple):
    """A part of the picture that is given: where `mask` (B, h, w, 1) is 0, `latents` (B, h, w, 4) noised by `noise`."""

    mask: jax.Array
    latents: jax.Array
    noise: jax.Array


class Constants(NamedTuple):
    """What stays the same over the loop, for all rows of each image's guidance.

    text: every cross-attention's keys and values. times: every call's embedding, (calls, C). classes: (rows, C), to be
    added to it. channels: (rows, h, w, c), what the UNet reads beside the latents. known: of B images. None: not
    there.
    """

    text: Any
    times: jax.Array
    classes: jax.Array | None
    channels: jax.Array | None
    known: Known | None
    freeu: FreeU | None


@dataclasses.dataclass(frozen=True)
class Programs:
    """In the order of a run. Where a program runs a network, its first argument are that network's parameters."""

    embed_images: Any
    vae_encode: Any
    estimate_depth: Any
    depth_condition: Any
    embed_text: Any
    condition: Any
    draw: Any
    latents_of: Any
    noise_low_res: Any
    prepare: Any
    start: Any
    run_steps: Any
    decode: Any


def make_programs(config: CheckpointConfig, networks: Mapping[str, Network], memory: Memory) -> Programs:
    """The programs for networks of these structures; their parameters are not touched.

    Programs of networks that the checkpoint does not have are not to be called. Raises ValueError for a tile that does
    not fit the VAE.
    """
    # The structures are closed over: as static arguments they would be hashed at every call.
    unet, vae, text = (networks[name] for name in ("unet", "vae", "text_encoder"))
    tile = memory.check_tile(config.vae.factor, config.unet.sample_size * config.vae.factor)

    def apply(name: str) -> Any:
        return jax.jit(lambda params, x: networks[name].merge(params)(x))

    return Programs(
        embed_images=apply("image_encoder"),
        vae_encode=jax.jit(lambda params, x: vae.merge(params).moments(x)),
        estimate_depth=apply("depth_estimator"),
        depth_condition=jax.jit(depth_condition, static_argnums=(1, 2)),
        embed_text=jax.jit(lambda params, tokens: text.merge(params)(tokens)),
        condition=jax.jit(_condition, static_argnames=("mixed", "width")),
        draw=jax.jit(_draw, static_argnames=("branch", "shape", "number")),
        latents_of=jax.jit(functools.partial(latents_from_moments, scaling_factor=config.vae.scaling_factor)),
        noise_low_res=jax.jit(noise_low_res),
        prepare=jax.jit(functools.partial(_prepare, unet), static_argnames="guidance"),
        start=jax.jit(_start, static_argnames="guidance"),
        run_steps=jax.jit(
            functools.partial(_advance, unet), static_argnames=("guidance", "tile"), donate_argnames="carry"
        ),
        decode=jax.jit(functools.partial(_decode, vae, memory, tile), static_argnames="in_tiles"),
    )


def _draw(seed: jax.Array, indices: jax.Array, *, branch: Branch, shape: tuple[int, ...], number: int) -> jax.Array:
    """Standard normal noise for B images: (B, *shape)."""
    return draw(image_keys(seed, indices), branch, shape, number)


def _condition(
    embeds: jax.Array,
    levels: jax.Array,
    weights: jax.Array | None,
    mix_levels: jax.Array | None,
    noise: jax.Array | None,
    seed: jax.Array,
    indices: jax.Array,
    noising: Mapping[str, jax.Array],
    *,
    mixed: bool,
    width: int,
) -> jax.Array:
    """The class labels of B images, (B, 2 D). embeds: (B, K, D) and levels: (B, K), the K pictures of each image."""
    pictures = embeds.shape[1]
    if noise is None:
        keys = image_keys(seed, indices)
        draws = [draw(keys, Branch.IMAGE, (width,), number) for number in range(pictures + (mix_levels is not None))]
        noise = jnp.stack(draws, axis=1)
    labels = jnp.stack(
        [noise_image_embeddings(embeds[:, k], levels[:, k], noise[:, k], **noising) for k in range(pictures)], axis=1
    )
    if not mixed:
        return labels[:, 0]
    assert weights is not None
    label = mix_conditions(labels, weights)
    if mix_levels is None:
        return label
    return noise_image_embeddings(label[:, :width], mix_levels, noise[:, pictures], **noising)


def _prepare(
    unet: Network,
    params: Mapping[str, jax.Array],
    text: jax.Array,
    negative: jax.Array | None,
    labels: jax.Array | None,
    timesteps: jax.Array,
    channels: jax.Array | None,
    known: Known | None,
    freeu: FreeU | None,
    *,
    guidance: Guidance,
) -> Constants:
    """The constants of a run of B images.

    text, negative: (B, T, C). labels: (B, 2 D) of unCLIP, (B,) int of an upscaler. channels: (B, h, w, c).
    """
    model = unet.merge(params)
    classes = None
    if labels is not None:
        # unCLIP's unconditional label is a vector of zeros, level and all, and it goes through the embedding's biases;
        # the noise level of an upscaler is the same in all rows.
        classes = model.embed_class(guidance_rows(guidance, labels if labels.ndim == 1 else 0 * labels, labels))
    return Constants(
        text=model.encode_context(guidance_rows(guidance, negative, text)),
        times=model.embed_time(timesteps),
        classes=classes,
        channels=None if channels is None else guidance_rows(guidance, channels, channels),
        known=known,
        freeu=freeu,
    )


def _start(solver: Solver, noise: jax.Array, clean: jax.Array | None, *, guidance: Guidance) -> Carry:
    return start(solver, noise, clean, guidance_state=guidance_state(guidance, noise))


def _advance(
    unet: Network,
    params: Mapping[str, jax.Array],
    solver: Solver,
    carry: Carry,
    rows: Mapping[str, jax.Array],
    constants: Constants,
    seed: jax.Array,
    indices: jax.Array,
    *,
    guidance: Guidance,
    tile: tuple[int, int] | None = None,
) -> Carry:
    """Some steps of the loop. tile: of `tiled`, its size and overlap in latents; None: the whole picture at once."""
    model = unet.merge(params)
    text, times, classes, channels, known, freeu = constants

    def network(x: jax.Array, row: Mapping[str, jax.Array], perturbed: jax.Array | None) -> jax.Array:
        emb = times[row["index"]][None]
        emb = emb if classes is None else emb + classes
        x = x if channels is None else jnp.concatenate([x, channels], axis=-1)
        layers = None if perturbed is None else model.perturb_attention(perturbed)

        def run(x: jax.Array, row: Mapping[str, jax.Array]) -> jax.Array:
            return model.denoise(x, emb, text, layers, freeu)

        return run(x, row) if tile is None else tiled(run, *tile)(x, row)

    def put_known(x: jax.Array, row: Mapping[str, jax.Array]) -> jax.Array:
        assert known is not None
        noised = row["known_signal"] * known.latents + row["known_noise"] * known.noise
        return known.mask * x + (1 - known.mask) * noised

    denoise = guided(network, guidance, solver.prediction_type)
    keys = image_keys(seed, indices) if solver.stochastic else None
    return run_stateful_steps(denoise, solver, carry, rows, keys, None if known is None else put_known)


def _decode(
    vae: Network,
    memory: Memory,
    tile: int,
    params: Mapping[str, jax.Array],
    latents: jax.Array,
    *,
    in_tiles: int | None = None,
) -> jax.Array:
    """in_tiles: latent cells along a tile's side, where the pictures are too large for a way of decoding chosen."""
    model = vae.merge(params)
    z = latents / model.config.scaling_factor
    picture = memory.decode(model, z, tile) if in_tiles is None else decode_tiled(model, z, in_tiles)
    return jnp.clip(picture / 2 + 0.5, 0.0, 1.0)
