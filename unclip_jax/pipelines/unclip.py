"""Image variations with Stable Diffusion 2.1 unCLIP: pictures and an optional prompt in, variations out.

pictures -> CLIP embeddings -> noised to a level (and mixed) -> class label --+
prompt   -> tokens -> text encoder ---------------------------> text states --+-> denoising loop -> VAE -> images
"""

import contextlib
import dataclasses
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image

from unclip_jax.checkpoints.checkpoint import Checkpoint, family_config
from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.checkpoints.loading import load_networks, return_freed_memory
from unclip_jax.checkpoints.networks import Network, abstract_networks
from unclip_jax.checkpoints.source import open_checkpoint
from unclip_jax.compilation import use_compilation_cache
from unclip_jax.conditioning.image import load_image, preprocess
from unclip_jax.conditioning.tokenizer import Tokenizer
from unclip_jax.distributed import mesh as placement
from unclip_jax.pictures import to_uint8
from unclip_jax.pipelines import arguments as check
from unclip_jax.pipelines.memory import Memory
from unclip_jax.pipelines.programs import make_programs
from unclip_jax.progress import Progress
from unclip_jax.sampling.loop import Carry
from unclip_jax.sampling.schedule import alphas_cumprod
from unclip_jax.sampling.solvers import Solver, make_solver

ImageInput = Image.Image | str | os.PathLike[str] | np.ndarray
OutputType = Literal["pil", "np", "latent"]
DEFAULT_MEMORY = Memory()
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}

# A linear guess of a latent cell's colour, for previews: rows are Stable Diffusion's four latent channels.
LATENT_RGB = np.array(
    [[0.298, 0.207, 0.208], [0.187, 0.286, 0.173], [-0.158, 0.189, 0.264], [-0.184, -0.271, -0.473]], np.float32
)


@dataclasses.dataclass(frozen=True)
class UnCLIPOutput:
    """images: list of PIL pictures, or (B, H, W, 3) float32 in 0..1, or latents, as `output_type` asked.

    image_embeds: (pictures, D) float32, before noising. latents: (B, H/f, W/f, 4) float32, scaled.
    """

    images: Any
    image_embeds: np.ndarray
    latents: np.ndarray


@dataclasses.dataclass(frozen=True)
class StreamState:
    """One step of `UnCLIPPipeline.stream`. latents: (B, H/f, W/f, 4) after `step` of `num_steps` network calls."""

    step: int
    num_steps: int
    latents: np.ndarray
    x0: np.ndarray
    _pipeline: "UnCLIPPipeline"

    def preview(self) -> list[Image.Image]:
        """Small pictures, a pixel a latent cell: a linear guess from the network's current estimate of the end."""
        rgb = np.clip(self.x0[..., : len(LATENT_RGB)] @ LATENT_RGB[: self.x0.shape[-1]] + 0.5, 0.0, 1.0)
        return [Image.fromarray(a) for a in to_uint8(rgb, "round")]

    def decode(self) -> list[Image.Image]:
        """Full pictures: the VAE's decoding of the network's current estimate of the end."""
        return self._pipeline.to_pil(self._pipeline.decode_latents(self.x0))


@dataclasses.dataclass(frozen=True)
class _Request:
    """A checked call: what every one of B images is made from, as host arrays."""

    solver: Solver
    guided: bool
    guidance_scale: np.ndarray  # (calls, B)
    seed: int
    batch: int
    repeats: int
    latent_shape: tuple[int, int, int]
    pictures: int
    images: list[np.ndarray] | None  # (H, W, 3) uint8 each
    image_embeds: np.ndarray | None  # (pictures, D)
    prompts: list[str]
    negative_prompts: list[str]
    prompt_embeds: np.ndarray | None
    negative_prompt_embeds: np.ndarray | None
    noise_level: np.ndarray  # (pictures,)
    weights: np.ndarray | None  # (pictures,)
    mix_noise_level: int | None
    latents: np.ndarray | None
    image_noise: np.ndarray | None  # (B, draws, D)
    step_noise: np.ndarray | None
    batch_size: int
    output_type: OutputType

    @property
    def draws(self) -> int:
        """How often the image embedding of one output is noised."""
        return 1 if self.weights is None else self.pictures + (self.mix_noise_level is not None)


class UnCLIPPipeline:
    """Makes variations of pictures. Build it with `from_pretrained`, call it, or `stream` it step by step.

    config, tokenizer, networks (name -> `Network`), mesh, dtype and memory are public, for research code that takes the
    parts; with `Memory(free_networks=True)` the networks have shapes in the place of parameters.
    Set `progress` to False for silence; the whole denoising loop is then one compiled program instead of one a step.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        tokenizer: Tokenizer,
        networks: Mapping[str, Network],
        statistics: tuple[np.ndarray, np.ndarray],
        mesh: Mesh,
        dtype: Any,
        memory: Memory = DEFAULT_MEMORY,
        checkpoint: Checkpoint | None = None,
    ):
        if config.image_encoder is None or config.image_noising is None:
            raise ValueError("this checkpoint has no image encoder: it is not an unCLIP one")
        self.config = config
        self.tokenizer = tokenizer
        self.networks = dict(networks)
        self.mesh = mesh
        self.dtype = dtype
        self.memory = memory
        self.progress = True
        self._checkpoint = checkpoint
        self._loaded: dict[str, Mapping[str, jax.Array]] = {}
        reference: Literal["ldm", "diffusers"] = "ldm" if config.dialect == "original" else "diffusers"
        everywhere = placement.replicated(mesh)
        self._noising = jax.device_put(
            {
                "alphas_cumprod": alphas_cumprod(config.image_noising, reference),
                "mean": statistics[0],
                "std": statistics[1],
            },
            everywhere,
        )
        self.programs = make_programs(config, self.networks, memory)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] | None = None,
        dtype: Any = None,
        mesh: Mesh | None = None,
        memory: Memory = DEFAULT_MEMORY,
        **overrides: Any,
    ) -> "UnCLIPPipeline":
        """Opens a checkpoint and puts its networks on the devices.

        source: a converted directory, a diffusers folder, an original `.ckpt`/`.safetensors` file, or a hub id; None
            for the demo model that comes with the package (64x64 drawings), see docs/demo-model.md.
        dtype: of weights and computation, "float32", "bfloat16" or "float16" (or a jnp dtype); None is float32 on CPU
            and bfloat16 on accelerators.
        mesh: None for all local devices along "data"; or a `jax.sharding.Mesh` with axes "data" and/or "model".
        memory: what to do to need less of it, see `unclip_jax.pipelines.memory.Memory`.
        overrides: `config`, `clip_stats`, `preprocess`, `variant`, `revision`, `ema`, see
            `unclip_jax.checkpoints.source.open_checkpoint`.

        Raises FileNotFoundError when there is nothing at `source`, ValueError for a file or option that is refused.
        """
        known = ("config", "clip_stats", "preprocess", "variant", "revision", "ema")
        if unknown := overrides.keys() - set(known):
            raise ValueError(f"unknown overrides {', '.join(sorted(unknown))}; accepted: {', '.join(known)}")
        mesh = placement.local_mesh() if mesh is None else placement.check_mesh(mesh)
        use_compilation_cache()
        with contextlib.ExitStack() as stack:
            checkpoint = stack.enter_context(open_checkpoint(source, **overrides))
            pipe = cls.from_checkpoint(checkpoint, dtype, mesh, memory)
            if memory.free_networks:
                stack.pop_all()
            return pipe

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, dtype: Any, mesh: Mesh, memory: Memory = DEFAULT_MEMORY
    ) -> "UnCLIPPipeline":
        """Fills the networks of an open checkpoint, parameter by parameter, straight onto their devices.

        With `memory.free_networks` nothing is read yet, and the checkpoint has to stay open as long as the pipeline.
        """
        dtype = _dtype(dtype, mesh)
        config = family_config(checkpoint)
        if config.image_encoder is None:
            raise ValueError(f"{checkpoint.source}: no image encoder in this checkpoint: it is not an unCLIP one")
        networks = abstract_networks(config, dtype, memory.attention_chunk)
        if not memory.free_networks:
            networks = load_networks(checkpoint, networks, mesh)
        mean, std = (np.asarray(checkpoint.params[f"image_normalizer.{n}"].read(), np.float32) for n in ("mean", "std"))
        kept_open = checkpoint if memory.free_networks else None
        return cls(config, checkpoint.tokenizer, networks, (mean, std), mesh, dtype, memory, kept_open)

    def __call__(
        self,
        image: ImageInput | Sequence[ImageInput] | None = None,
        prompt: str | Sequence[str] = "",
        negative_prompt: str | Sequence[str] = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: Any = 10.0,
        noise_level: int | Sequence[int] = 0,
        num_images_per_prompt: int = 1,
        scheduler: str | Solver | None = None,
        eta: float = 0.0,
        seed: int = 0,
        image_embeds: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        image_weights: Any = None,
        mix_noise_level: int | None = None,
        latents: Any = None,
        image_noise: Any = None,
        step_noise: Any = None,
        batch_size: int | None = None,
        output_type: OutputType = "pil",
    ) -> UnCLIPOutput:
        """Makes `num_images_per_prompt` variations of each picture, or of the mix of all.

        B = pictures * num_images_per_prompt, picture-major; with `image_weights`, B = num_images_per_prompt.

        image: PIL picture, path, uint8 (H, W, 3), float 0..1 (H, W, 3), or a list of them; or instead
        image_embeds: (pictures, D) CLIP embeddings, before noising
        prompt, negative_prompt: a string, or one a picture; or instead
        prompt_embeds, negative_prompt_embeds: (1 or pictures, T, C) states of the text encoder
        height, width: in pixels, multiples of 64 (for Stable Diffusion 2); default the checkpoint's sample size
        num_inference_steps: 1..1000
        guidance_scale: a number, one a step, one an image, or (network calls, B)
        noise_level: 0..1000, how far the embedding is from the picture's; an int or one a picture
        scheduler: None for the checkpoint's own, a name (`unclip_jax.sampling.SCHEDULERS`) or a Solver
        eta: 0..1, how stochastic DDIM is
        seed: 0..2**32 - 1; image i's noise comes from (seed, i) alone
        image_weights: one a picture: mix them all, sum(w e) / sum(w); mix_noise_level: noise the mix once more
        latents: (B, H/f, W/f, 4) initial noise, standard normal for every solver
        image_noise: (B, D) or (pictures, D), mixing (B, K, D) or (B, K + 1, D)
        step_noise: (network calls, B, H/f, W/f, 4) for stochastic solvers
        batch_size: images a compiled call; None is all at once
        output_type: "pil", "np" (B, H, W, 3) float32 0..1, "latent"

        Raises ValueError (or FileNotFoundError) for bad arguments, before anything is compiled.
        """
        request = self._check(**{k: v for k, v in locals().items() if k != "self"})
        embeds = self._image_embeds(request)
        latents = np.concatenate([self._run(request, embeds, chunk) for chunk in self._chunks(request)])
        if request.output_type == "latent":
            return UnCLIPOutput(latents, embeds, latents)
        images = self.decode_latents(latents)
        return UnCLIPOutput(images if request.output_type == "np" else self.to_pil(images), embeds, latents)

    def stream(self, **arguments: Any) -> Generator[StreamState, None, None]:
        """The same run as a generator: a `StreamState` after every network call. Close it at any step.

        Takes what `__call__` takes (`output_type` has no meaning here); all images run in one batch, so `batch_size`
        is refused. Arguments are checked when `stream` is called, not at the first step.
        """
        if arguments.get("batch_size") is not None:
            raise ValueError("batch_size has no meaning for stream: all images run together")
        defaults = dict(_CALL_DEFAULTS)
        if unknown := arguments.keys() - defaults.keys():
            raise TypeError(f"stream got unknown arguments: {', '.join(sorted(unknown))}")
        request = self._check(**{**defaults, **arguments})
        return self._stream(request)

    def decode_latents(self, latents: np.ndarray) -> np.ndarray:
        """latents: (B, H/f, W/f, 4), scaled -> pictures (B, H, W, 3) float32 in 0..1; one a device at a time."""
        group, params = placement.data_size(self.mesh), self._weights("vae")
        images = []
        with Progress("decoding", len(latents), unit="image", enabled=self.progress) as bar:
            for first in range(0, len(latents), group):
                rows = latents[first : first + group]
                padded = jax.device_put(placement.pad_batch(rows, group), placement.batch_sharding(self.mesh))
                images.append(np.asarray(self.programs.decode(params, padded))[: len(rows)])
                bar.update(len(rows))
        return np.concatenate(images)

    def to_pil(self, images: np.ndarray) -> list[Image.Image]:
        """(B, H, W, 3) in 0..1 -> PIL pictures, with the rounding of the checkpoint's reference."""
        rounding: Literal["truncate", "round"] = "truncate" if self.config.dialect == "original" else "round"
        return [Image.fromarray(a) for a in to_uint8(images, rounding)]

    def encode_images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Pictures, (H, W, 3) uint8 each -> CLIP embeddings (pictures, D) float32, un-normalised."""
        assert self.config.image_encoder is not None
        size = self.config.image_encoder.image_size
        pixels = np.stack([preprocess(image, self.config.preprocess, size) for image in images])
        params = self._weights("image_encoder")
        with Progress("encoding pictures", len(pixels), unit="image", enabled=self.progress) as bar:
            # One at a time: a picture's embedding then never depends on its company.
            rows = []
            for row in pixels:
                placed = jax.device_put(row[None], placement.replicated(self.mesh))
                rows.append(np.asarray(self.programs.embed_images(params, placed), np.float32))
                bar.update()
        return np.concatenate(rows)

    def encode_prompts(self, prompts: Sequence[str]) -> np.ndarray:
        """Prompts -> the text encoder's states (B, T, C) float32. Equal prompts are encoded once."""
        unique = list(dict.fromkeys(prompts))
        tokens = self.tokenizer(unique)
        if tokens.max() >= self.config.text_encoder.vocab_size:
            raise ValueError(
                f"prompt: token id {tokens.max()} is outside the text encoder's vocabulary of "
                f"{self.config.text_encoder.vocab_size}"
            )
        params = self._weights("text_encoder")
        rows = {}
        with Progress("encoding prompts", len(unique), unit="prompt", enabled=self.progress) as bar:
            for prompt, row in zip(unique, tokens, strict=True):
                placed = jax.device_put(row[None], placement.replicated(self.mesh))
                rows[prompt] = np.asarray(self.programs.embed_text(params, placed), np.float32)[0]
                bar.update()
        return np.stack([rows[prompt] for prompt in prompts])

    # -- a call, step by step ------------------------------------------------------------------------------------------

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

    def _check(self, **a: Any) -> _Request:
        """Every check of every argument; touches no device."""
        config, vision = self.config, self.config.image_encoder
        assert vision is not None
        factor, unit = config.vae.factor, config.unet.size_multiple
        default = config.unet.sample_size * factor
        height = check.check_size("height", a["height"], factor * unit, default)
        width = check.check_size("width", a["width"], factor * unit, default)
        latent_shape = (height // factor, width // factor, config.vae.latent_channels)
        steps = check.check_integer("num_inference_steps", a["num_inference_steps"], 1, 1000)
        repeats = check.check_integer("num_images_per_prompt", a["num_images_per_prompt"], 1, 1 << 20)
        seed = check.check_integer("seed", a["seed"], 0, check.MAX_SEED)
        if a["output_type"] not in ("pil", "np", "latent"):
            raise ValueError(f"output_type is {a['output_type']!r}; accepted: 'pil', 'np', 'latent'")
        name = config.scheduler if a["scheduler"] is None else a["scheduler"]
        if isinstance(name, Solver):
            solver, name = name, "solver"
        elif isinstance(name, str):
            solver = make_solver(name, config.scheduler_config, steps, a["eta"])
        else:
            raise ValueError(f"scheduler is {name!r}; want None, a name or a Solver")

        images, embeds = None, None
        if (a["image"] is None) == (a["image_embeds"] is None):
            raise ValueError(
                "give one of image and image_embeds, " + ("not both" if a["image"] is not None else "got neither")
            )
        if a["image"] is not None:
            images = [load_image(i) for i in (a["image"] if isinstance(a["image"], list | tuple) else [a["image"]])]
            if not images:
                raise ValueError("image is an empty list")
            if config.preprocess.startswith("original"):
                for picture in images:
                    if min(picture.shape[:2]) < 64:
                        raise ValueError(
                            f"image is {picture.shape[1]}x{picture.shape[0]}; the {config.preprocess!r} preprocessing "
                            "needs sides of at least 64 pixels"
                        )
        else:
            embeds = check.check_array("image_embeds", a["image_embeds"], (None, vision.projection_dim))
        pictures = len(images) if images is not None else len(embeds)  # type: ignore[arg-type]
        if pictures == 0:
            raise ValueError("image_embeds has no rows")

        weights, mix_level = None, None
        if a["image_weights"] is not None:
            weights = check.check_weights(a["image_weights"], pictures)
            if a["mix_noise_level"] is not None:
                mix_level = int(check.check_noise_levels(a["mix_noise_level"], 1)[0])
        elif a["mix_noise_level"] is not None:
            raise ValueError("mix_noise_level is given without image_weights: there is no mix to noise")
        prompt_count = pictures if weights is None else 1
        batch = prompt_count * repeats
        levels = check.check_noise_levels(a["noise_level"], pictures)
        guided, scale = check.check_guidance(a["guidance_scale"], name, solver, batch)

        text = (self.config.text_encoder.context_length, self.config.text_encoder.width)
        embeddings = {}
        for key in ("prompt_embeds", "negative_prompt_embeds"):
            value = a[key]
            embeddings[key] = (
                value if value is None else check.check_array(key, value, (1, *text), (prompt_count, *text))
            )
        prompts = check.check_prompts("prompt", a["prompt"], prompt_count)
        negatives = check.check_prompts("negative_prompt", a["negative_prompt"], prompt_count)

        shapes: dict[str, tuple[tuple[int | None, ...], ...]] = {
            "latents": ((batch, *latent_shape),),
            "step_noise": ((solver.calls, batch, *latent_shape),),
        }
        d = vision.projection_dim
        if weights is None:
            shapes["image_noise"] = ((batch, d), (pictures, d))
        else:
            shapes["image_noise"] = ((batch, pictures + (mix_level is not None), d),)
        arrays = {k: None if a[k] is None else check.check_array(k, a[k], *s) for k, s in shapes.items()}
        noise = arrays["image_noise"]
        if noise is not None and weights is None:
            noise = (noise if len(noise) == batch else np.repeat(noise, repeats, axis=0))[:, None]
        size = batch if a["batch_size"] is None else check.check_integer("batch_size", a["batch_size"], 1, 1 << 20)
        return _Request(
            solver=solver,
            guided=guided,
            guidance_scale=scale,
            seed=seed,
            batch=batch,
            repeats=repeats,
            latent_shape=latent_shape,
            pictures=pictures,
            images=images,
            image_embeds=embeds,
            prompts=prompts,
            negative_prompts=negatives,
            prompt_embeds=embeddings["prompt_embeds"],
            negative_prompt_embeds=embeddings["negative_prompt_embeds"],
            noise_level=levels,
            weights=weights,
            mix_noise_level=mix_level,
            latents=arrays["latents"],
            image_noise=noise,
            step_noise=arrays["step_noise"],
            batch_size=min(size, batch),
            output_type=a["output_type"],
        )

    def _chunks(self, request: _Request) -> Iterator[np.ndarray]:
        """The images' indices, `batch_size` at a time."""
        for first in range(0, request.batch, request.batch_size):
            yield np.arange(first, min(first + request.batch_size, request.batch))

    def _image_embeds(self, request: _Request) -> np.ndarray:
        if request.image_embeds is not None:
            return request.image_embeds
        assert request.images is not None
        return self.encode_images(request.images)

    def _run(self, request: _Request, embeds: np.ndarray, chunk: np.ndarray) -> np.ndarray:
        """The latents of some of a request's images, at the end of the loop."""
        calls = request.solver.calls
        carry, advance_rows = self._begin(request, embeds, chunk)
        label = f"sampling {len(chunk)} image{'s' * (len(chunk) > 1)}"
        with Progress(f"{label} (compiling)", calls, unit="step", enabled=self.progress) as bar:
            # With somebody watching, a program of one step runs `calls` times; otherwise one program runs them all.
            stride = 1 if self.progress else calls
            for first in range(0, calls, stride):
                carry = advance_rows(carry, slice(first, first + stride))
                if self.progress:
                    jax.block_until_ready(carry.latents)
                    bar.stage(label)
                bar.update(stride)
            return np.asarray(carry.latents)[: len(chunk)]

    def _stream(self, request: _Request) -> Generator[StreamState, None, None]:
        chunk = np.arange(request.batch)
        carry, advance_rows = self._begin(request, self._image_embeds(request), chunk)
        for call in range(request.solver.calls):
            carry = advance_rows(carry, slice(call, call + 1))
            latents, x0 = (np.asarray(a)[: len(chunk)] for a in (carry.latents, carry.x0))
            yield StreamState(call + 1, request.solver.calls, latents, x0, self)

    def _begin(self, request: _Request, embeds: np.ndarray, chunk: np.ndarray) -> tuple[Carry, Any]:
        """The start of a run, and a function that takes it through some rows of the grid."""
        size = placement.data_size(self.mesh)
        rows = placement.pad_batch(chunk, -(-len(chunk) // size) * size)
        by_batch, everywhere = placement.batch_sharding(self.mesh), placement.replicated(self.mesh)
        by_call = NamedSharding(self.mesh, P(None, *by_batch.spec))

        def split(array: np.ndarray) -> jax.Array:
            return jax.device_put(array, by_batch)

        picture = rows // request.repeats  # which picture (and prompt) each image is of
        seed, indices = jax.device_put(np.uint32(request.seed), everywhere), split(rows.astype(np.int32))
        mixed = request.weights is not None
        count = len(picture)
        labels = self.programs.condition(
            split(np.broadcast_to(embeds, (count, *embeds.shape)) if mixed else embeds[picture][:, None]),
            split(
                np.broadcast_to(request.noise_level, (count, request.pictures))
                if mixed
                else request.noise_level[picture][:, None]
            ),
            None if request.weights is None else jax.device_put(request.weights, everywhere),
            None if request.mix_noise_level is None else split(np.full(count, request.mix_noise_level, np.int32)),
            None if request.image_noise is None else split(request.image_noise[rows]),
            seed,
            indices,
            self._noising,
            mixed=mixed,
            width=embeds.shape[-1],
        )
        text = self._text(request.prompts, request.prompt_embeds)
        negative = self._text(request.negative_prompts, request.negative_prompt_embeds) if request.guided else None

        def of_picture(states: np.ndarray) -> jax.Array:
            return split(states[np.minimum(picture, len(states) - 1)])

        unet, solver = self._weights("unet"), request.solver
        constants = self.programs.prepare(
            unet,
            of_picture(text),
            None if negative is None else of_picture(negative),
            labels,
            jax.device_put(np.asarray(solver.grid["timestep"]), everywhere),
            guided=request.guided,
        )
        if request.latents is None:
            latents = self.programs.draw_latents(seed, indices, request.latent_shape)
        else:
            latents = split(request.latents[rows])
        columns: dict[str, Any] = {name: jax.device_put(np.asarray(c), everywhere) for name, c in solver.grid.items()}
        columns["guidance_scale"] = jax.device_put(request.guidance_scale[:, rows], by_call)
        if request.step_noise is not None and solver.stochastic:
            columns["step_noise"] = jax.device_put(request.step_noise[:, rows], by_call)

        def advance_rows(carry: Carry, part: slice) -> Carry:
            grid = columns if part.stop - part.start == solver.calls else {k: c[part] for k, c in columns.items()}
            return self.programs.advance(unet, solver, carry, grid, constants, seed, indices, guided=request.guided)

        return self.programs.start(solver, latents), advance_rows

    def _text(self, prompts: list[str], embeds: np.ndarray | None) -> np.ndarray:
        return self.encode_prompts(prompts) if embeds is None else embeds


_CALL_DEFAULTS = dict(
    zip(
        UnCLIPPipeline.__call__.__code__.co_varnames[1 : UnCLIPPipeline.__call__.__code__.co_argcount],
        UnCLIPPipeline.__call__.__defaults__ or (),
        strict=True,
    )
)


def _dtype(dtype: Any, mesh: Mesh) -> Any:
    if dtype is None:
        return jnp.float32 if mesh.devices.flat[0].platform == "cpu" else jnp.bfloat16
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; accepted: {', '.join(DTYPES)}")
    return DTYPES[name]
