"""The UNet under guidance, as the loop calls it: the one wiring for pipelines, training samples and the memory plan."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unclip_jax.checkpoints.networks import Network
from unclip_jax.models.freeu import FreeU
from unclip_jax.pipelines.control import Control, ControlConstants, control_constants, control_residuals
from unclip_jax.sampling.guidance import Guidance, guidance_rows, guided
from unclip_jax.sampling.loop import Between, StatefulDenoise
from unclip_jax.sampling.solvers import Row
from unclip_jax.sampling.solvers.solver import State
from unclip_jax.sampling.tiled import tiled


class Known(NamedTuple):
    """A part of the image that is given: where `mask` (B, h, w, 1) is 0, `latents` (B, h, w, 4) noised by `noise`."""

    mask: jax.Array
    latents: jax.Array
    noise: jax.Array


class Constants(NamedTuple):
    """What stays the same over the loop, for all guidance rows of each image. None: not there.

    Attributes:
        text: the keys and values of every cross-attention.
        classes: (rows, C), to be added to the embedding of the time.
        channels: (rows, h, w, c), what the UNet reads beside the latents.
        known: of B images.
        controls: of the ControlNets.
    """

    text: Any
    classes: jax.Array | None
    channels: jax.Array | None
    known: Known | None
    freeu: FreeU | None
    controls: tuple[ControlConstants, ...] = ()


def prepare(
    unet: Network,
    params: Mapping[str, jax.Array],
    text: jax.Array,
    negative: jax.Array | None,
    labels: jax.Array | None,
    channels: jax.Array | None = None,
    known: Known | None = None,
    freeu: FreeU | None = None,
    controls: Sequence[Control] = (),
    *,
    guidance: Guidance,
) -> Constants:
    """The constants of a run of B images.

    Args:
        text, negative: (B, T, C) states of the text encoder; negative is not read without guidance.
        labels: (B, 2 D) of unCLIP, (B,) integers of an upscaler.
        channels: (B, h, w, c). With an image row in the guidance they are the image, and zero in the unconditional row.
    """
    model = unet.merge(params)
    states, of_classes = guidance_rows(guidance, negative, text), None
    if labels is not None:
        # unCLIP's unconditional label is a vector of zeros, level and all, and it goes through the embedding's biases;
        # the noise level of an upscaler is the same in all rows.
        of_classes = guidance_rows(guidance, labels if labels.ndim == 1 else 0 * labels, labels)
    return Constants(
        text=model.encode_context(states),
        classes=None if of_classes is None else model.embed_class(of_classes),
        channels=None if channels is None else _channel_rows(guidance, channels),
        known=known,
        freeu=freeu,
        controls=tuple(control_constants(control, states, of_classes, guidance) for control in controls),
    )


def _channel_rows(guidance: Guidance, channels: jax.Array) -> jax.Array:
    return guidance_rows(guidance, 0 * channels if guidance.image else channels, channels, channels)


def unet_denoiser(
    unet: Network,
    params: Mapping[str, jax.Array],
    constants: Constants,
    guidance: Guidance,
    prediction_type: str,
    tile: tuple[int, int] | None = None,
    controls: Sequence[Control] = (),
    image_first: bool = False,
    cached: bool = False,
) -> StatefulDenoise:
    """The guided UNet, as `unclip_jax.sampling.run_stateful_steps` takes it.

    Args:
        controls: the ControlNets, those of `constants`; not together with tiles.
        tile: size and overlap in latents, see `unclip_jax.sampling.tiled`; None: the whole image at once.
        image_first: whether the UNet reads the channels of `constants` before the latents.
        cached: whether the state has, beside guidance's, what was deep in the UNet at the last row that says
            `deep`; the others use that. Not together with tiles or ControlNets.
    """
    text, classes, channels, _, freeu, of_controls = constants

    def predict(
        x: jax.Array, row: Row, perturbed: jax.Array | None, deep: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        # Merged within the loop: a network that recomputes its activations must not come from outside of it.
        model = unet.merge(params)
        # Not outside of the loop, where its shape would be the number of steps, and another number another program.
        emb = model.embed_time(row["timestep"][None])
        emb = emb if classes is None else emb + classes
        residuals = control_residuals(controls, of_controls, x, row, guidance)
        if channels is not None:
            x = jnp.concatenate([channels, x] if image_first else [x, channels], axis=-1)
        layers = None if perturbed is None else model.perturb_attention(perturbed)

        def run(x: jax.Array, row: Row) -> jax.Array:
            return model.denoise(x, emb, text, layers, freeu, residuals)

        def whole(deep: jax.Array) -> tuple[jax.Array, jax.Array]:
            prediction, found = model.denoise_deeply(x, emb, text, layers, freeu)
            return prediction, found.astype(deep.dtype)

        def shallow(deep: jax.Array) -> tuple[jax.Array, jax.Array]:
            return model.denoise_shallowly(x, emb, text, deep, freeu), deep

        if deep is not None:
            made: tuple[jax.Array, jax.Array] = jax.lax.cond(row["deep"], whole, shallow, deep)
            return made
        return run(x, row) if tile is None else tiled(run, *tile)(x, row), None

    def denoise(x: jax.Array, row: Row, state: State) -> tuple[jax.Array, State]:
        own, deep = state if cached else (state, None)

        def network(x: jax.Array, row: Row, perturbed: jax.Array | None) -> jax.Array:
            nonlocal deep
            prediction, deep = predict(x, row, perturbed, deep)
            return prediction

        out, own = guided(network, guidance, prediction_type)(x, row, own)
        return out, (own, deep) if cached else own

    return denoise


def put_back(known: Known) -> Between:
    """What goes between two steps: the known part of the image, noised to the level of the row."""

    def between(x: jax.Array, row: Row) -> jax.Array:
        noised = row["known_signal"] * known.latents + row["known_noise"] * known.noise
        return known.mask * x + (1 - known.mask) * noised

    return between
