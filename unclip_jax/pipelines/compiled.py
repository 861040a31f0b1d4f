"""The compiled programs of a pipeline: pure functions of weights and arrays, each compiled once a shape."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.checkpoints.networks import Network
from unclip_jax.compilation import compiler_options
from unclip_jax.conditioning.depth import depth_condition
from unclip_jax.conditioning.latents import latents_as_encoded, latents_from_moments
from unclip_jax.conditioning.noise_augmentation import mix_conditions, noise_image_embeddings
from unclip_jax.conditioning.upscale import noise_low_res
from unclip_jax.executables import Executables, Stored
from unclip_jax.image_files import to_uint8_on_device
from unclip_jax.models.configs import AutoencoderTinyConfig
from unclip_jax.pipelines.control import Control, embed_hint
from unclip_jax.pipelines.denoiser import Constants, prepare, put_back, unet_denoiser
from unclip_jax.pipelines.memory import Memory
from unclip_jax.sampling.guidance import Guidance, guidance_state
from unclip_jax.sampling.loop import Carry, run_stateful_steps, start
from unclip_jax.sampling.noise import Branch, draw, image_keys
from unclip_jax.sampling.solvers import Solver


@dataclasses.dataclass(frozen=True)
class Programs:
    """In the order of a run. They take arrays by position, and what is compiled in by name.

    Where a program runs a network, its first argument are that network's parameters.
    """

    embed_images: Any
    vae_encode: Any
    estimate_depth: Any
    depth_condition: Any
    embed_text: Any
    class_labels: Any
    draw: Any
    sample_latents: Any
    noise_low_res: Any
    embed_hint: Any
    prepare: Any
    start: Any
    run_steps: Any
    decode: Any
    to_uint8: Any


def make_programs(
    config: CheckpointConfig, networks: Mapping[str, Network], mesh: Mesh, dtype: Any, memory: Memory
) -> Programs:
    """The programs for networks of these structures; their parameters are not touched.

    Programs of networks that the checkpoint does not have are not to be called. Raises ValueError for a tile, or
    a way of decoding, that does not fit the VAE.
    """
    # The structures are closed over: as static arguments they would be hashed at every call.
    unet, vae = networks["unet"], networks["vae"]
    tile = memory.check_tile(config.vae.factor, config.unet.sample_size * config.vae.factor)
    tiny = isinstance(config.vae, AutoencoderTinyConfig)
    if tiny and memory.decoding == "seamless":
        raise ValueError("decoding is 'seamless', which a tiny autoencoder does not have; want 'whole' or 'tiled'")
    to_latents = latents_as_encoded if tiny else latents_from_moments

    options = functools.partial(compiler_options, mesh, dtype, sharded=memory.shard_weights)
    jit = functools.partial(jax.jit, compiler_options=options())

    def apply(name: str) -> Any:
        return lambda params, x: networks[name].merge(params)(x)

    def tower(name: str) -> Any:
        return jax.jit(apply(name), compiler_options=options(tower=True))

    return Programs(
        embed_images=tower("image_encoder"),
        vae_encode=jit(lambda params, x: vae.merge(params).moments(x)),
        estimate_depth=jit(apply("depth_estimator")),
        depth_condition=jax.jit(depth_condition, static_argnames=("height", "width")),
        embed_text=tower("text_encoder"),
        class_labels=jax.jit(_class_labels, static_argnames=("mixed", "width")),
        draw=jax.jit(_draw, static_argnames=("branch", "shape", "number")),
        sample_latents=jax.jit(functools.partial(to_latents, scaling_factor=config.vae.scaling_factor)),
        noise_low_res=jax.jit(_noise_low_res),
        embed_hint=jit(embed_hint),
        prepare=jit(functools.partial(prepare, unet), static_argnames="guidance"),
        start=jax.jit(functools.partial(_start, dtype), static_argnames=("guidance", "cached")),
        run_steps=jit(
            functools.partial(_run_steps, unet, config.image_first),
            static_argnames=("guidance", "tile"),
            donate_argnames="carry",
        ),
        decode=jit(functools.partial(_decode, vae, memory, tile), static_argnames=("in_tiles", "clipped")),
        to_uint8=to_uint8_on_device,
    )


def compiled_ahead(programs: Programs, executables: Executables | None) -> Programs:
    """The programs, each of which looks among the executables first."""
    if executables is None:
        return programs
    jitted = {field.name: getattr(programs, field.name) for field in dataclasses.fields(programs)}
    return Programs(**{name: Stored(name, program, executables) for name, program in jitted.items()})


def _draw(seeds: jax.Array, indices: jax.Array, *, branch: Branch, shape: tuple[int, ...], number: int) -> jax.Array:
    """Standard normal noise for B images: (B, *shape)."""
    return draw(image_keys(seeds, indices), branch, shape, number)


def _class_labels(
    embeds: jax.Array,
    levels: jax.Array,
    weights: jax.Array | None,
    mix_levels: jax.Array | None,
    noise: jax.Array | None,
    seeds: jax.Array,
    indices: jax.Array,
    noising: Mapping[str, jax.Array],
    *,
    mixed: bool,
    width: int,
) -> jax.Array:
    """The class labels of B images, (B, 2 D). embeds: (B, K, D), levels: (B, K), of the K inputs of each image."""
    inputs = embeds.shape[1]
    if noise is None:
        keys = image_keys(seeds, indices)
        draws = [draw(keys, Branch.IMAGE, (width,), number) for number in range(inputs + (mix_levels is not None))]
        noise = jnp.stack(draws, axis=1)
    labels = jnp.stack(
        [noise_image_embeddings(embeds[:, k], levels[:, k], noise[:, k], **noising) for k in range(inputs)], axis=1
    )
    if not mixed:
        return labels[:, 0]
    assert weights is not None
    label = mix_conditions(labels, weights)
    if mix_levels is None:
        return label
    return noise_image_embeddings(label[:, :width], mix_levels, noise[:, inputs], **noising)


def _noise_low_res(
    pixels: jax.Array, levels: jax.Array, noise: jax.Array, noising: Mapping[str, jax.Array]
) -> jax.Array:
    return noise_low_res(pixels, levels, noise, **noising)


def _start(
    dtype: Any,
    solver: Solver,
    noise: jax.Array,
    clean: jax.Array | None,
    *,
    guidance: Guidance,
    cached: tuple[int, int, int] | None = None,
) -> Carry:
    """cached: (h, w, channels) of what the UNet keeps for each row, of `dtype`; None: it keeps nothing."""
    state = guidance_state(guidance, noise)
    if cached is not None:
        state = state, jnp.zeros((guidance.rows * len(noise), *cached), dtype)
    return start(solver, noise, clean, guidance_state=state)


def _run_steps(
    unet: Network,
    image_first: bool,
    params: Mapping[str, jax.Array],
    solver: Solver,
    carry: Carry,
    rows: Mapping[str, jax.Array],
    constants: Constants,
    seeds: jax.Array,
    indices: jax.Array,
    span: tuple[jax.Array, jax.Array],
    controls: Sequence[Control] = (),
    *,
    guidance: Guidance,
    tile: tuple[int, int] | None = None,
) -> tuple[Carry, jax.Array]:
    """Some steps of the loop, and their number: it is there when they are done, and is not donated to the next ones.

    Args:
        span: which of the rows, see `unclip_jax.sampling.run_stateful_steps`.
        controls: the ControlNets that these steps run, those of `constants`.
        tile: size and overlap in latents, see `unclip_jax.sampling.tiled`; None: no tiles.
    """
    denoise = unet_denoiser(
        unet, params, constants, guidance, solver.prediction_type, tile, controls, image_first, "deep" in rows
    )
    keys = image_keys(seeds, indices) if solver.stochastic else None
    between = None if constants.known is None else put_back(constants.known)
    return run_stateful_steps(denoise, solver, carry, rows, keys, between, span), span[1] - span[0]


def _decode(
    vae: Network,
    memory: Memory,
    tile: int,
    params: Mapping[str, jax.Array],
    latents: jax.Array,
    *,
    in_tiles: int | None = None,
    clipped: bool = True,
) -> jax.Array:
    """Scaled latents -> images (B, H, W, 3) in 0..1, or as the VAE gives them, around -1..1.

    Args:
        in_tiles: latent cells along a tile's side, instead of the way that `Memory` chooses.
        clipped: whether they are put into 0..1.
    """
    from unclip_jax.models.tiling import decode_tiled  # with Flax: only where this is traced

    model = vae.merge(params)
    z = latents / model.config.scaling_factor
    image = memory.decode(model, z, tile) if in_tiles is None else decode_tiled(model, z, in_tiles)
    return jnp.clip(image / 2 + 0.5, 0.0, 1.0) if clipped else image
