"""The compiled programs of the unCLIP pipeline: pure functions of weights and arrays, each compiled once a shape."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.checkpoints.networks import Network
from unclip_jax.conditioning.noise_augmentation import mix_conditions, noise_image_embeddings
from unclip_jax.pipelines.memory import Memory
from unclip_jax.sampling.guidance import double, guide, interleave
from unclip_jax.sampling.loop import Carry, advance, start
from unclip_jax.sampling.noise import Branch, draw, image_keys
from unclip_jax.sampling.solvers import Solver


@dataclasses.dataclass(frozen=True)
class Programs:
    """In the order of a run. Where a program runs a network, its first argument are that network's parameters."""

    embed_images: Any
    embed_text: Any
    condition: Any
    draw_latents: Any
    prepare: Any
    start: Any
    advance: Any
    decode: Any


def make_programs(config: CheckpointConfig, networks: Mapping[str, Network], memory: Memory) -> Programs:
    """The programs for networks of these structures; their parameters are not touched.

    Raises ValueError for a tile that does not fit the VAE.
    """
    # The structures are closed over: as static arguments they would be hashed at every call.
    unet, vision, text = (networks[name] for name in ("unet", "image_encoder", "text_encoder"))
    tile = memory.check_tile(config.vae.factor, config.unet.sample_size * config.vae.factor)
    decode = functools.partial(_decode, networks["vae"], memory, tile)
    return Programs(
        embed_images=jax.jit(lambda params, x: vision.merge(params)(x)),
        embed_text=jax.jit(lambda params, tokens: text.merge(params)(tokens)),
        condition=jax.jit(_condition, static_argnames=("mixed", "width")),
        draw_latents=jax.jit(
            lambda seed, indices, shape: draw(image_keys(seed, indices), Branch.LATENTS, shape), static_argnums=2
        ),
        prepare=jax.jit(functools.partial(_prepare, unet), static_argnames="guided"),
        start=jax.jit(start),
        advance=jax.jit(functools.partial(_advance, unet), static_argnames="guided", donate_argnames="carry"),
        decode=jax.jit(decode),
    )


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
    labels: jax.Array,
    timesteps: jax.Array,
    *,
    guided: bool,
) -> tuple[Any, jax.Array, jax.Array]:
    """What stays the same over the loop: the text's keys and values, the class embedding, every step's embedding."""
    model = unet.merge(params)
    if guided:
        assert negative is not None
        text = interleave(negative, text)
        # The unconditional label is a vector of zeros, level and all, and it goes through the embedding's biases.
        labels = interleave(jnp.zeros_like(labels), labels)
    return model.encode_context(text), model.embed_class(labels), model.embed_time(timesteps)


def _advance(
    unet: Network,
    params: Mapping[str, jax.Array],
    solver: Solver,
    carry: Carry,
    rows: Mapping[str, jax.Array],
    constants: tuple[Any, jax.Array, jax.Array],
    seed: jax.Array,
    indices: jax.Array,
    *,
    guided: bool,
) -> Carry:
    """Some steps of the loop."""
    model = unet.merge(params)
    text, classes, times = constants

    def denoise(x: jax.Array, row: Mapping[str, jax.Array]) -> jax.Array:
        emb = classes + times[row["index"]]
        out = model.denoise(double(x) if guided else x, emb, text)
        return guide(out, row["guidance_scale"]) if guided else out.astype(jnp.float32)

    return advance(denoise, solver, carry, rows, image_keys(seed, indices) if solver.stochastic else None)


def _decode(vae: Network, memory: Memory, tile: int, params: Mapping[str, jax.Array], latents: jax.Array) -> jax.Array:
    model = vae.merge(params)
    picture = memory.decode(model, latents / model.config.scaling_factor, tile)
    return jnp.clip(picture / 2 + 0.5, 0.0, 1.0)
