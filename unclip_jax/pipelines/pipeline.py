"""What all pipelines share: opening a checkpoint, and the way from checked arguments to pictures.

pictures -> image encoder, noised -> class labels ----+
pictures -> VAE, depth estimator -> latents, channels -+-> denoising loop -> VAE -> images
prompts  -> text encoder --------> text states --------+
"""

import contextlib
import dataclasses
import inspect
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image

from unclip_jax.adapters import loaded
from unclip_jax.adapters.loaded import Adapters
from unclip_jax.adapters.textual_inversion import EMBEDDING, expand_words
from unclip_jax.checkpoints.checkpoint import Checkpoint, family_config
from unclip_jax.checkpoints.config import CheckpointConfig, Task
from unclip_jax.checkpoints.loading import load_networks, return_freed_memory
from unclip_jax.checkpoints.networks import Network, abstract_networks
from unclip_jax.checkpoints.repairs import repaired
from unclip_jax.checkpoints.source import open_checkpoint
from unclip_jax.compilation import use_compilation_cache
from unclip_jax.conditioning.clip_image import ImageSource as ImageInput
from unclip_jax.conditioning.clip_image import load_images, preprocess
from unclip_jax.conditioning.tokenizer import Tokenizer
from unclip_jax.distributed import mesh as placement
from unclip_jax.image_files import to_uint8
from unclip_jax.models.freeu import FreeU
from unclip_jax.pipelines.arguments import MAX_SCALE, check_number
from unclip_jax.pipelines.compiled import Known, make_programs
from unclip_jax.pipelines.memory import Memory
from unclip_jax.pipelines.request import Request
from unclip_jax.progress import Progress
from unclip_jax.safety import SafetyChecker
from unclip_jax.safety import check as check_safety
from unclip_jax.sampling.loop import Carry
from unclip_jax.sampling.noise import Branch
from unclip_jax.sampling.schedule import alphas_cumprod
from unclip_jax.watermark import SMALLEST, embed_watermark

DEFAULT_MEMORY = Memory()
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
OVERRIDES = (
    *("config", "prediction_type", "clip_stats", "vae", "unet", "preprocess", "ema"),
    *("variant", "revision", "subfolder", "mirrors"),
)

# A linear guess of a latent cell's colour, for previews: rows are Stable Diffusion's four latent channels.
LATENT_RGB = np.array(
    [[0.298, 0.207, 0.208], [0.187, 0.286, 0.173], [-0.158, 0.189, 0.264], [-0.184, -0.271, -0.473]], np.float32
)


@dataclasses.dataclass(frozen=True)
class PipelineOutput:
    """images: list of PIL pictures, or (B, H, W, 3) float32 in 0..1, or latents, as `output_type` asked.

    latents: (B, H/f, W/f, 4) float32, scaled. image_embeds: of unCLIP checkpoints, (pictures, D) float32, before
    noising; None for the others. nsfw_content_detected: which pictures a safety checker has made black; None without.
    """

    images: Any
    latents: np.ndarray
    image_embeds: np.ndarray | None = None
    nsfw_content_detected: list[bool] | None = None


@dataclasses.dataclass(frozen=True)
class StreamState:
    """One step of `Pipeline.stream`. latents: (B, H/f, W/f, 4) after `step` of `num_steps` network calls."""

    step: int
    num_steps: int
    latents: np.ndarray
    x0: np.ndarray
    _pipeline: "Pipeline"
    _request: Request

    def preview(self) -> list[Image.Image]:
        """Small pictures, a pixel a latent cell: a linear guess from the network's current estimate of the end."""
        rgb = np.clip(self.x0[..., : len(LATENT_RGB)] @ LATENT_RGB[: self.x0.shape[-1]] + 0.5, 0.0, 1.0)
        return [Image.fromarray(a) for a in to_uint8(rgb, "round")]

    def decode(self) -> list[Image.Image]:
        """Full pictures of the network's current estimate of the end, finished as those of a call: checked, marked."""
        return self._pipeline._images(self._request, self.x0)[0]


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some of a request's images on their devices. rows: their indices, padded; parts: which prompt each is of.

    seed, indices: of their keys. split: (rows, ...) on the host -> over the devices.
    """

    rows: np.ndarray
    parts: np.ndarray
    seed: jax.Array
    indices: jax.Array
    split: Callable[[np.ndarray], jax.Array]

    def of_prompts(self, values: np.ndarray) -> np.ndarray:
        """Each image's row of values, which have one a prompt or one for all."""
        return values[np.minimum(self.parts, len(values) - 1)]


class Pipeline:
    """From inputs to pictures. Build one with `from_pretrained`, call it, or `stream` it step by step.

    config, tokenizer, networks (name -> `Network`), mesh, dtype and memory are public, for research code that takes the
    parts; with `Memory(free_networks=True)` the networks have shapes in the place of parameters.
    Set `progress` to False for silence; the whole denoising loop is then one compiled program instead of one a step.
    Set `watermark` to bytes, as `unclip_jax.watermark.MARK`, to mark pictures of 256x256 and more invisibly, and
    `safety_checker` to what `convert.safety.open_safety_checker` opens, to make black what it flags; both need
    `output_type="pil"`. docs/use-restrictions.md says what they can.

    Arguments that all pipelines have:

    prompt, negative_prompt: a string, or one a picture; or instead
    prompt_embeds, negative_prompt_embeds: (1 or prompts, T, C) states of the text encoder
    num_inference_steps: 1..1000
    guidance_scale: a number, one a step, one an image, or (network calls, B)
    guidance_rescale: 0..1, how far the guided prediction gets the deviation of the conditional one
    guidance_interval: (low, high) in units of sigma, the noise levels at which there is guidance; None is all
    pag_scale: of perturbed-attention guidance, from 0, which is none
    projected_guidance: a `ProjectedGuidance`, or None
    num_images_per_prompt: B is so many times the number of prompts (or pictures), those of one prompt side by side
    scheduler: None for the checkpoint's own, a name (`unclip_jax.sampling.SCHEDULERS`) or a Solver; see docs/solvers.md
    eta: 0..1, how stochastic DDIM is
    seed: 0..2**32 - 1; image i's noise comes from (seed, i) alone
    step_noise: (network calls, B, H/f, W/f, 4) for stochastic solvers, instead of what the seed gives
    batch_size: images a compiled call; None is all at once
    output_type: "pil", "np" (B, H, W, 3) float32 0..1, "latent"

    All are checked before anything is compiled: ValueError (or FileNotFoundError).
    """

    tasks: ClassVar[tuple[Task, ...]]
    diffusers_class: ClassVar[str]  # the same pipeline there

    def __init__(
        self,
        config: CheckpointConfig,
        tokenizer: Tokenizer,
        networks: Mapping[str, Network],
        statistics: tuple[np.ndarray, np.ndarray] | None,
        mesh: Mesh,
        dtype: Any,
        memory: Memory = DEFAULT_MEMORY,
        checkpoint: Checkpoint | None = None,
    ):
        self.config = config
        self.tokenizer = tokenizer
        self.networks = dict(networks)
        self.mesh = mesh
        self.dtype = dtype
        self.memory = memory
        self.progress = True
        self.freeu: FreeU | None = None
        self.watermark: bytes | None = None
        self.safety_checker: SafetyChecker | None = None
        self._adapters = Adapters((tokenizer, self.networks), tokenizer)
        self._checkpoint = checkpoint
        self._loaded: dict[str, Mapping[str, jax.Array]] = {}
        self._noising: Mapping[str, jax.Array] = {}
        if config.image_noising is not None:
            reference: Literal["ldm", "diffusers"] = "ldm" if config.dialect == "original" else "diffusers"
            tables = {"alphas_cumprod": alphas_cumprod(config.image_noising, reference)}
            if statistics is not None:
                tables |= {"mean": statistics[0], "std": statistics[1]}
            self._noising = jax.device_put(tables, placement.replicated(mesh))
        self.programs = make_programs(config, self.networks, memory)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] | None = None,
        dtype: Any = None,
        mesh: Mesh | None = None,
        memory: Memory = DEFAULT_MEMORY,
        **overrides: Any,
    ) -> Self:
        """Opens a checkpoint and puts its networks on the devices.

        source: a converted directory, a diffusers folder, an original `.ckpt`/`.safetensors` file, or one of these on
            the hub ("owner/name", "owner/name/FILE" or FOLDER, an address); None for the demo model that comes with
            the package (64x64 drawings), see docs/demo-model.md.
        dtype: of weights and computation, "float32", "bfloat16" or "float16" (or a jnp dtype); None is float32 on CPU
            and bfloat16 on accelerators.
        mesh: None for all local devices along "data"; or a `jax.sharding.Mesh` with axes "data" and/or "model".
        memory: what to do to need less of it, see `unclip_jax.pipelines.memory.Memory`.
        overrides: `config`, `prediction_type`, `clip_stats`, `vae`, `unet`, `preprocess`, `variant`, `revision`,
            `subfolder`, `mirrors`, `ema`, see `unclip_jax.checkpoints.source.open_checkpoint`.

        Raises FileNotFoundError when there is nothing at `source`, ValueError for a file or option that is refused.
        """
        return open_pipeline(lambda config: cls, source, dtype, mesh, memory, overrides)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, dtype: Any, mesh: Mesh, memory: Memory = DEFAULT_MEMORY) -> Self:
        """Fills the networks of an open checkpoint, parameter by parameter, straight onto their devices.

        What diffusers' pipeline corrects in the files of a folder is corrected, with a warning, see
        `unclip_jax.checkpoints.repairs`.
        With `memory.free_networks` nothing is read yet, and the checkpoint has to stay open as long as the pipeline.
        Raises ValueError for a checkpoint of another task.
        """
        dtype = check_dtype(dtype, mesh)
        config = family_config(checkpoint)
        if config.task not in cls.tasks:
            raise ValueError(
                f"{checkpoint.source} is a checkpoint for {config.task}; {cls.__name__} takes one for "
                f"{' or '.join(cls.tasks)}"
            )
        config = repaired(config, cls.diffusers_class, checkpoint.source)
        networks = abstract_networks(config, dtype, memory.attention_chunk)
        if not memory.free_networks:
            networks = load_networks(checkpoint, networks, mesh)
        statistics = None
        if config.image_embedding_dim is not None:
            mean, std = (checkpoint.params[f"image_normalizer.{name}"].read() for name in ("mean", "std"))
            statistics = (np.asarray(mean, np.float32), np.asarray(std, np.float32))
        kept_open = checkpoint if memory.free_networks else None
        return cls(config, checkpoint.tokenizer, networks, statistics, mesh, dtype, memory, kept_open)

    def stream(self, **arguments: Any) -> Generator[StreamState, None, None]:
        """The same run as a generator: a `StreamState` after every network call. Close it at any step.

        Takes what a call takes (`output_type` has no meaning here); all images run in one batch, so `batch_size` is
        refused. Arguments are checked when `stream` is called, not at the first step.
        """
        if arguments.get("batch_size") is not None:
            raise ValueError("batch_size has no meaning for stream: all images run together")
        request = self._checked(arguments)
        self._check_finish(dataclasses.replace(request, output_type="pil"))
        return self._stream(request)

    def check(self, **arguments: Any) -> Request:
        """What a call with these arguments is refused for, without the call: ValueError, FileNotFoundError."""
        request = self._checked(arguments)
        self._check_finish(request)
        return request

    def _checked(self, arguments: Mapping[str, Any]) -> Request:
        parameters = list(inspect.signature(type(self).__call__).parameters.values())[1:]
        if unknown := arguments.keys() - {p.name for p in parameters}:
            raise TypeError(f"unknown arguments: {', '.join(sorted(unknown))}")
        return self._check(**{**{p.name: p.default for p in parameters}, **arguments})

    def decode_latents(self, latents: np.ndarray, in_tiles: int | None = None) -> np.ndarray:
        """latents: (B, H/f, W/f, 4), scaled -> pictures (B, H, W, 3) float32 in 0..1; one a device at a time.

        in_tiles: latent cells along a tile's side, instead of the way that `memory` says.
        """
        group, params = placement.data_size(self.mesh), self._weights("vae")
        images = []
        with Progress("decoding", len(latents), unit="image", enabled=self.progress) as bar:
            for first in range(0, len(latents), group):
                rows = latents[first : first + group]
                padded = jax.device_put(placement.pad_batch(rows, group), placement.batch_sharding(self.mesh))
                images.append(np.asarray(self.programs.decode(params, padded, in_tiles=in_tiles))[: len(rows)])
                bar.update(len(rows))
        return np.concatenate(images)

    def to_pil(self, images: np.ndarray) -> list[Image.Image]:
        """(B, H, W, 3) in 0..1 -> PIL pictures, with the rounding of the checkpoint's reference."""
        rounding: Literal["truncate", "round"] = "truncate" if self.config.dialect == "original" else "round"
        return [Image.fromarray(a) for a in to_uint8(images, rounding)]

    def encode_image_embeds(self, images: ImageInput | Sequence[ImageInput]) -> np.ndarray:
        """A picture or several, as a call takes them -> CLIP embeddings (pictures, D) float32, un-normalised.

        Raises ValueError for what is no picture and for a checkpoint without an image encoder, and what
        `unclip_jax.conditioning.clip_image.load_image` raises.
        """
        if self.config.image_encoder is None:
            raise ValueError("images are given, but this checkpoint has no image encoder")
        size = self.config.image_encoder.image_size
        pixels = np.stack([preprocess(image, self.config.preprocess, size) for image in load_images(images, "images")])
        return self._one_by_one("image_encoder", self.programs.embed_images, pixels, "encoding pictures")

    def vae_encode(self, pixels: np.ndarray) -> np.ndarray:
        """Pictures (B, H, W, 3) in -1..1 -> the moments of the VAE's posterior (B, H/f, W/f, 8) float32."""
        return self._one_by_one("vae", self.programs.vae_encode, pixels, "encoding pictures")

    def encode_prompts(self, prompts: Sequence[str]) -> np.ndarray:
        """Prompts -> the text encoder's states (B, T, C) float32. Equal prompts are encoded once."""
        unique = list(dict.fromkeys(prompts))
        tokens = self.tokenizer([expand_words(self.tokenizer, prompt) for prompt in unique])
        rows = self.networks["text_encoder"].params[EMBEDDING].shape[0]
        if tokens.max() >= rows:
            raise ValueError(f"prompt: token id {tokens.max()} is outside the text encoder's vocabulary of {rows}")
        states = self._one_by_one("text_encoder", self.programs.embed_text, tokens, "encoding prompts")
        return states[[unique.index(prompt) for prompt in prompts]]

    # -- adapters ------------------------------------------------------------------------------------------------------

    def load_lora_weights(
        self,
        source: loaded.Source,
        adapter_name: str | None = None,
        weight: float = 1.0,
        weight_name: str | None = None,
    ) -> None:
        """Adds a LoRA, or one of its kin, to the UNet and the text encoder, beside those that are there already.

        source: a file, or a folder or a hub id with diffusers' `pytorch_lora_weights`, peft's `adapter_model`, or with
        the file `weight_name`; or a state dict of arrays. docs/adapters.md has the forms that are read. Learnt words
        that are bundled with it come along. adapter_name: by which `set_adapters` knows it, default the file's own (of
        a folder or a repository, that one's), without its suffix. weight: how much of it.

        Raises FileNotFoundError, ValueError in one line for a file that is not understood or of another model, and
        what `unclip_jax.checkpoints.hub.download` raises.
        """
        self._check_adaptable()
        weight = check_number("weight", weight, -MAX_SCALE, MAX_SCALE)
        self._adapt(loaded.load_lora(self._adapters, self.config, source, adapter_name, weight, weight_name))

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] = 1.0) -> None:
        """How much of each loaded LoRA is used; those that are not named get 0. Raises ValueError."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = list(adapter_weights) if isinstance(adapter_weights, Sequence) else [adapter_weights] * len(names)
        self._adapters.check_loaded(names)
        if len(weights) != len(names):
            raise ValueError(f"adapter_weights has {len(weights)} numbers for {len(names)} names; want one for each")
        weights = [check_number("adapter_weights", weight, -MAX_SCALE, MAX_SCALE) for weight in weights]
        self._adapt(self._adapters.weighted(dict(zip(names, weights, strict=True))))

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Takes LoRAs away, with the words that came with them. Raises ValueError for one that is not loaded."""
        self._adapt(self._adapters.without_loras([adapter_names] if isinstance(adapter_names, str) else adapter_names))

    def unload_lora_weights(self) -> None:
        """Takes all LoRAs away: the networks are those that were loaded, bit for bit, but for learnt words."""
        self._adapt(self._adapters.without_loras(list(self._adapters.loras)))

    def load_textual_inversion(
        self,
        source: loaded.WordSource | Sequence[loaded.WordSource],
        token: str | Sequence[str] | None = None,
        weight_name: str | None = None,
    ) -> None:
        """Adds learnt words, of diffusers', A1111's or the original's files, to the tokenizer and the text encoder.

        source: a file, or a folder or a hub id with diffusers' `learned_embeds`, or with the file `weight_name`; a
        state dict of arrays, or an array of a word's vectors; or a list of these. token: what to call the word, a list
        for a list; None is the file's own name of it. Of a list that is refused nothing is added.

        Raises FileNotFoundError, ValueError in one line for a file that is not understood or of another text encoder,
        and for a word that is there already, and what `unclip_jax.checkpoints.hub.download` raises.
        """
        self._check_adaptable()
        self._adapt(loaded.load_words(self._adapters, self.config, source, token, weight_name))

    def unload_textual_inversion(self, tokens: str | Sequence[str] | None = None) -> None:
        """Takes these learnt words away, or all of them. Raises ValueError for one that is not loaded."""
        self._adapt(self._adapters.without_words([tokens] if isinstance(tokens, str) else tokens))

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Reweights the UNet's way up, see `unclip_jax.models.freeu`. Raises ValueError for what is no number."""
        given = {"s1": s1, "s2": s2, "b1": b1, "b2": b2}
        # Floats, whatever was given: numbers of another type would compile the network anew.
        self.freeu = FreeU(*(check_number(name, value, 0, 100) for name, value in given.items()))

    def disable_freeu(self) -> None:
        """The UNet as it was trained."""
        self.freeu = None

    def _check_adaptable(self) -> None:
        if self._checkpoint is not None:
            raise ValueError("adapters need networks that stay in memory: open the pipeline without free_networks")

    def _adapt(self, adapters: Adapters) -> None:
        self.networks, self.tokenizer, self._adapters = adapters.networks(), adapters.tokenizer, adapters

    # -- a call, step by step ------------------------------------------------------------------------------------------

    def _check(self, **arguments: Any) -> Request:
        """Every check of every argument; touches no device."""
        raise NotImplementedError  # by each pipeline

    def _encode(self, request: Request) -> dict[str, np.ndarray]:
        """What the networks but the UNet say of the inputs, once a call, on the host. Pipelines add to it."""
        encoded = {}
        if request.start is not None:
            encoded["start"] = self.vae_encode(request.start.pixels)
        if (condition := request.condition) is not None:
            embeds, images = condition.image_embeds, condition.images
            encoded["embeds"] = self.encode_image_embeds(images or []) if embeds is None else embeds
        for name, prompts, embeds in (
            ("text", request.prompts, request.prompt_embeds),
            ("negative", request.negative_prompts, request.negative_prompt_embeds),
        ):
            if name == "text" or request.guidance.unconditional:
                states = self.encode_prompts(prompts) if embeds is None else embeds
                encoded[name] = np.broadcast_to(states, (len(prompts), *states.shape[1:]))
        return encoded

    def _labels(self, request: Request, encoded: Mapping[str, np.ndarray], chunk: Chunk) -> jax.Array | None:
        """The class labels: of the pictures that condition, if any."""
        condition = request.condition
        return None if condition is None else self._condition(condition, encoded["embeds"], chunk)

    def _channels(self, request: Request, encoded: Mapping[str, np.ndarray], chunk: Chunk) -> jax.Array | None:
        """What the UNet reads beside the latents, (B, h, w, c)."""
        return None

    def _start(self, request: Request, encoded: Mapping[str, np.ndarray], chunk: Chunk) -> Carry:
        """The run before its first step: from the start pictures, noised, or from pure noise."""
        if request.start is not None:
            latents = self._latents(request, encoded["start"], chunk)
            noise = self._noise(request.start.noise, Branch.LATENTS, request.latent_shape, chunk)
            return self.programs.start(request.solver, noise, latents, guidance=request.guidance)
        return self._from_noise(request, request.latents, chunk)

    def _known(self, request: Request, encoded: Mapping[str, np.ndarray], chunk: Chunk) -> Known | None:
        """The part of the picture that is given."""
        return None

    # -- parts of these ------------------------------------------------------------------------------------------------

    def _noise(
        self, given: np.ndarray | None, branch: Branch, shape: tuple[int, ...], chunk: Chunk, number: int = 0
    ) -> jax.Array:
        """(rows, *shape): of what is given for all B images, or by the images' keys."""
        if given is not None:
            return chunk.split(given[chunk.rows])
        return self.programs.draw(chunk.seed, chunk.indices, branch=branch, shape=shape, number=number)

    def _from_noise(self, request: Request, given: np.ndarray | None, chunk: Chunk) -> Carry:
        noise = self._noise(given, Branch.LATENTS, request.latent_shape, chunk)
        return self.programs.start(request.solver, noise, None, guidance=request.guidance)

    def _latents(self, request: Request, moments: np.ndarray, chunk: Chunk, number: int = 0) -> jax.Array:
        """Scaled latents (rows, h, w, 4) of encoded pictures, one a prompt or one for all.

        number: which encoding of an image it is, where there are several.
        """
        start = request.start
        assert start is not None
        given = None if start.posterior_noise is None else start.posterior_noise[number]
        if not start.sample_posterior:
            given = np.zeros((request.batch, *request.latent_shape), np.float32)
        noise = self._noise(given, Branch.POSTERIOR, request.latent_shape, chunk, number)
        return self.programs.latents_of(chunk.split(chunk.of_prompts(moments)), noise)

    def _condition(self, condition: Any, embeds: np.ndarray, chunk: Chunk) -> jax.Array:
        mixed, count = condition.weights is not None, len(chunk.rows)
        levels, everywhere = condition.noise_level, placement.replicated(self.mesh)
        if mixed:
            embeds = np.broadcast_to(embeds, (count, *embeds.shape))
            levels = np.broadcast_to(levels, (count, condition.pictures))
        else:
            embeds, levels = embeds[chunk.parts][:, None], levels[chunk.parts][:, None]
        mix_level, noise = condition.mix_noise_level, condition.image_noise
        return self.programs.condition(
            chunk.split(embeds),
            chunk.split(levels),
            jax.device_put(condition.weights, everywhere) if mixed else None,
            None if mix_level is None else chunk.split(np.full(count, mix_level, np.int32)),
            None if noise is None else chunk.split(noise[chunk.rows]),
            chunk.seed,
            chunk.indices,
            self._noising,
            mixed=mixed,
            width=embeds.shape[-1],
        )

    def _one_by_one(self, network: str, program: Any, inputs: np.ndarray, what: str) -> np.ndarray:
        """A network's program on each of B inputs: (B, ...) -> (B, ...) float32. None then depends on its company."""
        params, rows = self._weights(network), []
        with Progress(what, len(inputs), unit="input", enabled=self.progress) as bar:
            for row in inputs:
                placed = jax.device_put(row[None], placement.replicated(self.mesh))
                rows.append(np.asarray(program(params, placed), np.float32))
                bar.update()
        return np.concatenate(rows)

    def _weights(self, name: str) -> Mapping[str, jax.Array]:
        """A network's parameters: those that are kept, or read now, after those of another one were let go."""
        if self._checkpoint is None:
            return self.networks[name].params
        if name not in self._loaded:
            self._loaded.clear()
            return_freed_memory()
            network = load_networks(self._checkpoint, {name: self.networks[name]}, self.mesh, self.progress)[name]
            self._loaded[name] = network.params
        return self._loaded[name]

    def _make(self, request: Request) -> PipelineOutput:
        self._check_finish(request)
        encoded = self._encode(request)
        latents = np.concatenate([self._run(request, encoded, rows) for rows in request.chunks()])
        flagged = None
        if request.output_type == "latent":
            images: Any = latents
        elif request.output_type == "np":
            images = self._decode(request, latents)
        else:
            images, flagged = self._images(request, latents)
        return PipelineOutput(images, latents, encoded.get("embeds"), flagged)

    def _decode(self, request: Request, latents: np.ndarray) -> np.ndarray:
        """Pictures made in tiles are decoded in tiles, unless `memory` has another way of its own."""
        in_tiles = None if request.tile is None or self.memory.decoding != "whole" else request.tile[0]
        return self.decode_latents(latents, in_tiles)

    def _images(self, request: Request, latents: np.ndarray) -> tuple[list[Image.Image], list[bool] | None]:
        return self._finish(request, self.to_pil(self._decode(request, latents)))

    def _check_finish(self, request: Request) -> None:
        if self.watermark is None and self.safety_checker is None:
            return
        if request.output_type != "pil":
            raise ValueError(f"output_type is {request.output_type!r}; a watermark or a safety checker needs 'pil'")
        for height, width in self._finished_sizes(request):
            if self.watermark is not None and height * width < SMALLEST:
                raise ValueError(f"pictures of {width}x{height} are too small for a watermark; want {SMALLEST} pixels")

    def _finished_sizes(self, request: Request) -> set[tuple[int, int]]:
        """The heights and widths of the finished pictures."""
        height, width = (side * self.config.vae.factor for side in request.latent_shape[:2])
        return {(height, width)}

    def _finish(self, request: Request, images: list[Image.Image]) -> tuple[list[Image.Image], list[bool] | None]:
        """What is done to finished pictures: those that are flagged become black, then all are marked."""
        flagged = None
        if self.safety_checker is not None:
            flagged = check_safety(self.safety_checker, [np.asarray(image) for image in images])
            images = [
                Image.new("RGB", image.size) if bad else image for image, bad in zip(images, flagged, strict=True)
            ]
        if self.watermark is not None:
            mark = self.watermark
            images = [Image.fromarray(embed_watermark(np.asarray(image), mark)) for image in images]
        return images, flagged

    def _run(self, request: Request, encoded: Mapping[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
        """The latents of some of a request's images, at the end of the loop."""
        calls = request.solver.calls
        carry, advance_rows = self._begin(request, encoded, rows)
        label = f"sampling {len(rows)} image{'s' * (len(rows) > 1)}"
        with Progress(f"{label} (compiling)", calls, unit="step", enabled=self.progress) as bar:
            # With somebody watching, a program of one step runs `calls` times; otherwise one program runs them all.
            stride = 1 if self.progress else calls
            for first in range(0, calls, stride):
                carry = advance_rows(carry, slice(first, first + stride))
                if self.progress:
                    jax.block_until_ready(carry.latents)
                    bar.stage(label)
                bar.update(stride)
            return np.asarray(carry.latents)[: len(rows)]

    def _stream(self, request: Request) -> Generator[StreamState, None, None]:
        rows = np.arange(request.batch)
        carry, advance_rows = self._begin(request, self._encode(request), rows)
        for call in range(request.solver.calls):
            carry = advance_rows(carry, slice(call, call + 1))
            latents, x0 = (np.asarray(a)[: len(rows)] for a in (carry.latents, carry.x0))
            yield StreamState(call + 1, request.solver.calls, latents, x0, self, request)

    def _begin(
        self, request: Request, encoded: Mapping[str, np.ndarray], rows: np.ndarray
    ) -> tuple[Carry, Callable[[Carry, slice], Carry]]:
        """The start of a run, and a function that takes it through some rows of the grid."""
        size, solver = placement.data_size(self.mesh), request.solver
        rows = placement.pad_batch(rows, -(-len(rows) // size) * size)
        by_batch, everywhere = placement.batch_sharding(self.mesh), placement.replicated(self.mesh)
        by_call = NamedSharding(self.mesh, P(None, *by_batch.spec))

        def split(array: np.ndarray) -> jax.Array:
            return jax.device_put(array, by_batch)

        seed, indices = jax.device_put(np.uint32(request.seed), everywhere), split(rows.astype(np.int32))
        chunk = Chunk(rows, rows // request.repeats, seed, indices, split)
        labels = self._labels(request, encoded, chunk)
        channels, known = self._channels(request, encoded, chunk), self._known(request, encoded, chunk)
        carry = self._start(request, encoded, chunk)
        unet = self._weights("unet")
        constants = self.programs.prepare(
            unet,
            split(encoded["text"][chunk.parts]),
            split(encoded["negative"][chunk.parts]) if request.guidance.unconditional else None,
            labels,
            jax.device_put(np.asarray(solver.grid["timestep"]), everywhere),
            channels,
            known,
            self.freeu,
            guidance=request.guidance,
        )
        columns: dict[str, Any] = {name: jax.device_put(np.asarray(c), everywhere) for name, c in solver.grid.items()}
        columns |= {name: jax.device_put(c[:, rows], by_call) for name, c in request.strengths.items()}
        if known is not None:
            # What is known joins the latents at the noise level of the next call, and at the end without noise.
            next_levels = np.append(np.asarray(solver.grid["alpha_cumprod"])[1:], np.float32(1))
            weights = {"known_signal": np.sqrt(next_levels), "known_noise": np.sqrt(1 - next_levels)}
            columns |= jax.device_put({name: c for name, c in weights.items() if name not in columns}, everywhere)
        if request.step_noise is not None and solver.stochastic:
            columns["step_noise"] = jax.device_put(request.step_noise[:, rows], by_call)

        def advance_rows(carry: Carry, part: slice) -> Carry:
            grid = columns if part.stop - part.start == solver.calls else {k: c[part] for k, c in columns.items()}
            static = {"guidance": request.guidance, "tile": request.tile}
            return self.programs.run_steps(unet, solver, carry, grid, constants, seed, indices, **static)

        return carry, advance_rows


def open_pipeline(
    choose: Callable[[CheckpointConfig], Any],
    source: str | os.PathLike[str] | None,
    dtype: Any,
    mesh: Mesh | None,
    memory: Memory,
    overrides: Mapping[str, Any],
) -> Any:
    """Opens a checkpoint with the pipeline that `choose` names for it. Arguments: see `Pipeline.from_pretrained`."""
    check_overrides(overrides)
    mesh = placement.local_mesh() if mesh is None else placement.check_mesh(mesh)
    use_compilation_cache()
    with contextlib.ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(source, **overrides))
        pipe = choose(family_config(checkpoint)).from_checkpoint(checkpoint, dtype, mesh, memory)
        if memory.free_networks:
            stack.pop_all()
        return pipe


def check_overrides(overrides: Mapping[str, Any]) -> None:
    """Raises ValueError for what `open_checkpoint` does not take."""
    if unknown := overrides.keys() - set(OVERRIDES):
        raise ValueError(f"unknown overrides {', '.join(sorted(unknown))}; accepted: {', '.join(OVERRIDES)}")


def check_dtype(dtype: Any, mesh: Mesh) -> Any:
    """The dtype of weights and computation: None is float32 on a CPU and bfloat16 elsewhere. Raises ValueError."""
    if dtype is None:
        return jnp.float32 if mesh.devices.flat[0].platform == "cpu" else jnp.bfloat16
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; accepted: {', '.join(DTYPES)}")
    return DTYPES[name]
