"""What a run is made of: the networks of a checkpoint on their devices, and what each of them makes of an input."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from unclip_jax.adapters.textual_inversion import EMBEDDING, expand_words
from unclip_jax.checkpoints.checkpoint import Checkpoint
from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.checkpoints.loading import load_networks, return_freed_memory
from unclip_jax.checkpoints.networks import Network
from unclip_jax.conditioning.clip_image import ImageSource, load_images, preprocess
from unclip_jax.conditioning.tokenizer import Tokenizer
from unclip_jax.distributed.mesh import (
    Chunk,
    batch_sharding,
    data_size,
    gathered,
    own_part,
    own_rows,
    pad_batch,
    placed,
)
from unclip_jax.image_files import Rounding, refuse_nan
from unclip_jax.models.freeu import FreeU
from unclip_jax.pipelines.compiled import Programs
from unclip_jax.pipelines.memory import Memory
from unclip_jax.pipelines.prepared import Kernels
from unclip_jax.pipelines.request import Request
from unclip_jax.progress import Progress
from unclip_jax.sampling.loop import Carry
from unclip_jax.sampling.noise import Branch
from unclip_jax.sampling.solvers.solver import without_grid

# (a network's parameters, arrays of R rows on the devices) -> arrays of R rows there.
Program = Callable[[Mapping[str, jax.Array], jax.Array], Any]


@dataclasses.dataclass(frozen=True)
class Residency:
    """Networks that are read for their stage alone: the open checkpoint, and the one network that is loaded."""

    checkpoint: Checkpoint
    loaded: dict[str, Mapping[str, jax.Array]] = dataclasses.field(default_factory=dict)

    def weights(self, name: str, network: Network, mesh: Mesh, progress: bool) -> Mapping[str, jax.Array]:
        """A network's parameters: read now, after the last network's were let go, unless they are there."""
        if name not in self.loaded:
            self.loaded.clear()
            return_freed_memory()
            self.loaded[name] = load_networks(self.checkpoint, {name: network}, mesh, progress)[name].params
        return self.loaded[name]


@dataclasses.dataclass(frozen=True)
class Parts:
    """What the conditions and the loop of a call read.

    Attributes:
        config, tokenizer, mesh, memory: of the pipeline.
        networks: name -> `Network`; with a residency their parameters are shapes.
        programs: the compiled functions of the networks.
        noising: the tables by which unCLIP's image embeddings, or an upscaler's small image, are noised.
        freeu: how the UNet is reweighted; None: not.
        progress: whether stages show a bar.
        residency: of `Memory(free_networks=True)`.
        kernels: what programs read in the place of the networks' own; None: nothing.
        at_a_time: how many inputs of an encoder a device has at once. With 1 none depends on its company.
    """

    config: CheckpointConfig
    tokenizer: Tokenizer
    networks: Mapping[str, Network]
    programs: Programs
    noising: Mapping[str, jax.Array]
    mesh: Mesh
    memory: Memory
    freeu: FreeU | None = None
    progress: bool = True
    residency: Residency | None = None
    kernels: Kernels | None = None
    at_a_time: int = 1

    def weights(self, name: str) -> Mapping[str, jax.Array]:
        """A network's parameters, as the programs take them."""
        if self.residency is not None:
            return self.residency.weights(name, self.networks[name], self.mesh, self.progress)
        params = self.networks[name].params
        return params if self.kernels is None else self.kernels.weights(name, params, self.progress)


# -- inputs through a network ------------------------------------------------------------------------------------------


def encode_prompts(parts: Parts, prompts: Sequence[str]) -> np.ndarray:
    """Prompts -> the text encoder's states (B, T, C) float32. Equal prompts are encoded once."""
    unique = list(dict.fromkeys(prompts))
    written = unique
    if any(token.endswith("_1") for token in parts.tokenizer.added_tokens):  # a textual inversion of several vectors
        written = [expand_words(parts.tokenizer, prompt) for prompt in unique]
    tokens = parts.tokenizer(written)
    rows = parts.networks["text_encoder"].params[EMBEDDING].shape[0]
    if tokens.max() >= rows:
        raise ValueError(f"prompt: token id {tokens.max()} is outside the text encoder's vocabulary of {rows}")
    states = encode(parts, "text_encoder", parts.programs.embed_text, tokens, "encoding prompts")
    return states[[unique.index(prompt) for prompt in prompts]]


def encode_image_embeds(parts: Parts, images: ImageSource | Sequence[ImageSource]) -> np.ndarray:
    """An image or several, as a call takes them -> CLIP embeddings (images, D) float32, un-normalised."""
    if parts.config.image_encoder is None:
        raise ValueError("images are given, but this checkpoint has no image encoder")
    size = parts.config.image_encoder.image_size
    loaded = load_images(images, "images")
    with ThreadPoolExecutor() as pool:  # Pillow's resizing lets other threads run
        pixels = np.stack(list(pool.map(lambda image: preprocess(image, parts.config.preprocess, size), loaded)))
    return encode(parts, "image_encoder", parts.programs.embed_images, pixels, "encoding images")


def vae_encode(parts: Parts, pixels: np.ndarray) -> np.ndarray:
    """Images (B, H, W, 3) in -1..1 -> the moments of the VAE's posterior (B, H/f, W/f, 8), a tiny one's latents."""
    return encode(parts, "vae", parts.programs.vae_encode, pixels, "encoding images with the VAE")


def encode(parts: Parts, network: str, program: Program, inputs: np.ndarray, stage: str) -> np.ndarray:
    """A network's program on each of B inputs: (B, ...) -> (B, ...) float32."""
    params = parts.weights(network)
    bar = Progress(stage, len(inputs), unit="input", enabled=parts.progress)
    return np.asarray(one_by_one(parts.mesh, program, params, inputs, bar, parts.at_a_time), np.float32)


def decode_latents(parts: Parts, latents: np.ndarray, in_tiles: int | None = None) -> np.ndarray:
    """Scaled latents (B, H/f, W/f, 4) -> images (B, H, W, 3) float32 in 0..1; one per device at a time.

    Over several hosts each gets the images of its own devices, `own_rows` of the B.

    in_tiles: latent cells along a tile's side, instead of the way that `Memory` chooses.
    """
    program = functools.partial(parts.programs.decode, in_tiles=in_tiles)
    images = _decode(parts, program, latents, functools.partial(own_part, parts.mesh))
    return images[: len(own_rows(parts.mesh, len(latents)))]


def decode_values(parts: Parts, latents: np.ndarray) -> np.ndarray:
    """Scaled latents (B, H/f, W/f, 4) -> what the VAE gives, (B, H, W, 3) float32 around -1..1; on every host all."""
    made: np.ndarray = _decode(parts, functools.partial(parts.programs.decode, clipped=False), latents, gathered)
    return made


def decode_to_uint8(
    parts: Parts, latents: np.ndarray, rounding: Rounding, in_tiles: int | None = None
) -> NDArray[np.uint8]:
    """The same, as `to_uint8` makes them 8 bits; on the devices, which then send a quarter of the bytes.

    Raises FloatingPointError as there.
    """

    def fetch(made: tuple[jax.Array, jax.Array]) -> tuple[np.ndarray, np.ndarray]:
        return own_part(parts.mesh, made[0]), gathered(made[1])  # no host goes on where another cannot

    images, broken = _decode(parts, uint8_program(parts, rounding, in_tiles), latents, fetch)
    refuse_nan(broken.any())
    return images[: len(own_rows(parts.mesh, len(latents)))]


def uint8_program(parts: Parts, rounding: Rounding, in_tiles: int | None) -> Program:
    """Scaled latents -> 8-bit images (R, H, W, 3), and which of them have a NaN, (R,) bool; see `decode_to_uint8`."""

    def program(params: Mapping[str, jax.Array], rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        images = parts.programs.decode(params, rows, in_tiles=in_tiles)
        made: tuple[jax.Array, jax.Array] = parts.programs.to_uint8(images, rounding=rounding)
        return made

    return program


def _decode(parts: Parts, program: Program, latents: np.ndarray, fetch: Callable[[Any], Any]) -> Any:
    params = parts.weights("vae")
    bar = Progress("decoding", len(latents), unit="image", enabled=parts.progress)
    return one_by_one(parts.mesh, program, params, latents, bar, to_host=fetch)


def one_by_one(
    mesh: Mesh,
    program: Program,
    params: Mapping[str, jax.Array],
    inputs: np.ndarray,
    bar: Progress,
    at_a_time: int = 1,
    to_host: Callable[[Any], Any] = gathered,
) -> Any:
    """What a program makes of each of B inputs, on the host: (B, ...) -> its arrays, (B, ...) each.

    Each device has one input at a time, so no result depends on its company, or `at_a_time`; and one program serves
    any number of them. While results are fetched, the devices have the next inputs already.

    to_host: fetches what the program makes at a time; over several hosts perhaps a part of it.
    """
    group = data_size(mesh) * at_a_time
    waiting: list[Any] = []
    made: list[Any] = []

    def fetch() -> None:
        made.append(to_host(waiting.pop(0)))
        bar.update(min(group, len(inputs) - bar.done))

    with bar:
        for first in range(0, len(inputs), group):
            rows = pad_batch(inputs[first : first + group], group)
            waiting.append(program(params, placed(rows, batch_sharding(mesh))))
            if len(waiting) > 1:
                fetch()
        fetch()
    return jax.tree.map(lambda *arrays: np.concatenate(arrays)[: len(inputs)], *made)


# -- pieces of conditions ----------------------------------------------------------------------------------------------


def text_states(parts: Parts, request: Request[Any]) -> tuple[np.ndarray, np.ndarray | None]:
    """The text states of the prompts, and of the negative prompts where there is guidance: (1 or prompts, T, C)."""
    text, negative = request.prompt_embeds, None
    if text is None:
        text = encode_prompts(parts, request.prompts)
    if request.guidance.unconditional:
        negative = request.negative_prompt_embeds
        if negative is None:
            negative = encode_prompts(parts, request.negative_prompts)
    return text, negative


def noise_of(
    parts: Parts, given: np.ndarray | None, branch: Branch, shape: tuple[int, ...], chunk: Chunk, number: int = 0
) -> jax.Array:
    """(R, *shape): what is given for the images, or drawn by their keys."""
    if given is not None:
        return chunk.of_images(given)
    return parts.programs.draw(chunk.seeds, chunk.indices, branch=branch, shape=shape, number=number)


def started(parts: Parts, request: Request[Any], noise: jax.Array, clean: jax.Array | None) -> Carry:
    """A run before its first step, from noise (R, h, w, 4); or from clean latents, to which it is added."""
    cached: dict[str, Any] = {}
    if request.deep_cache > 1:
        cached["cached"] = (*request.latent_shape[:2], parts.config.unet.block_out_channels[0])
    carry: Carry = parts.programs.start(without_grid(request.solver), noise, clean, guidance=request.guidance, **cached)
    return carry


def from_noise(parts: Parts, request: Request[Any], latents: np.ndarray | None) -> Callable[[Chunk], Carry]:
    """A run that starts from pure noise. latents: (B, h, w, 4), given for it."""

    def start(chunk: Chunk) -> Carry:
        noise = noise_of(parts, latents, Branch.LATENTS, request.latent_shape, chunk)
        return started(parts, request, noise, None)

    return start
