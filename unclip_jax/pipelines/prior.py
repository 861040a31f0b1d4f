"""The unCLIP prior: prompts in, CLIP image embeddings out, for an unCLIP pipeline's `image_embeds`.

prompts -> tokens -> CLIP's text tower -> its states, embedding and mask -> denoising loop -> image embeddings
"""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from unclip_jax.checkpoints.checkpoint import Checkpoint, prior_config
from unclip_jax.checkpoints.config import PriorCheckpointConfig
from unclip_jax.checkpoints.networks import Network
from unclip_jax.checkpoints.source import open_prior
from unclip_jax.compilation import use_compilation_cache
from unclip_jax.conditioning.tokenizer import Tokenizer
from unclip_jax.distributed.mesh import Chunk, check_mesh, local_mesh, make_chunk, placed, replicated
from unclip_jax.pipelines.arguments import PriorArguments, signed
from unclip_jax.pipelines.checks import (
    MAX_IMAGES,
    check_array,
    check_integer,
    check_prompts,
    check_seed,
    count_texts,
    is_number,
    optional_array,
)
from unclip_jax.pipelines.memory import Memory
from unclip_jax.pipelines.opening import DEFAULT_MEMORY, check_dtype, open_networks
from unclip_jax.pipelines.parts import Residency, one_by_one
from unclip_jax.pipelines.request import ADDED, BY_CALL
from unclip_jax.progress import Progress
from unclip_jax.reference import Reference
from unclip_jax.sampling.guidance import Guidance, guidance_rows, guided
from unclip_jax.sampling.loop import run_stateful_steps, start
from unclip_jax.sampling.noise import Branch, branch, draw, image_keys
from unclip_jax.sampling.solvers import Row, Solver
from unclip_jax.sampling.solvers.unclip_scheduler import prior_solver


class TextFeatures(NamedTuple):
    """What the prior reads of B texts: `TextToEmbeddingPrior.encode_prompts` makes them.

    states: (B, S, D) float32, of CLIP's text tower after its final norm; embeds: (B, D) float32, un-normalised; mask:
    (B, S) bool, true up to and including the end token.
    """

    states: Any
    embeds: Any
    mask: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriorRequest:
    """A checked call, as host arrays; B = P * repeats.

    Attributes:
        text: of P prompts; None: to be encoded from `prompts`. negative: of 1 or P; None: the empty prompt's.
        latents: (B, D). step_noise: (network evaluations, B, D). None: by the keys.
    """

    prompts: list[str] | None
    text: TextFeatures | None
    negative: TextFeatures | None
    batch: int = dataclasses.field(metadata=ADDED)
    repeats: int
    solver: Solver
    guidance: Guidance
    guidance_scale: np.float32
    latents: np.ndarray | None
    step_noise: np.ndarray | None = dataclasses.field(metadata=BY_CALL)
    seeds: np.ndarray
    indices: np.ndarray
    batch_size: int = dataclasses.field(metadata=ADDED)


class TextToEmbeddingPrior:
    """Makes CLIP image embeddings of prompts. Build it with `from_pretrained` and call it.

    Attributes:
        config, tokenizer, networks ("prior" and "text_encoder"), mesh, dtype: what was opened.
        statistics: the mean and the deviation of image embeddings, (D,) each, by which the network's are normalised.
        residency: of `Memory(free_networks=True)`.
        progress: False for silence.
    """

    def __init__(
        self,
        config: PriorCheckpointConfig,
        tokenizer: Tokenizer,
        networks: Mapping[str, Network],
        statistics: tuple[np.ndarray, np.ndarray],
        mesh: Mesh,
        dtype: DTypeLike,
        residency: Residency | None = None,
    ):
        self.config = config
        self.tokenizer = tokenizer
        self.networks = dict(networks)
        self.mesh = mesh
        self.dtype = dtype
        self.residency = residency
        self.progress = True
        self.statistics = placed(statistics, replicated(mesh))
        text = networks["text_encoder"]
        self.embed_text = jax.jit(lambda params, tokens: text.merge(params).describe(tokens))
        self.run = jax.jit(functools.partial(_run, networks["prior"]), static_argnames=("guidance", "dim"))

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        dtype: DTypeLike | None = None,
        mesh: Mesh | None = None,
        memory: Memory = DEFAULT_MEMORY,
        **overrides: Any,
    ) -> "TextToEmbeddingPrior":
        """Opens a prior and puts its networks on the devices.

        Args:
            source: a converted directory, a diffusers folder with the prior's parts, Karlo's own checkpoint, or a hub
                id.
            dtype, mesh: as for `unclip_jax.UnCLIPPipeline.from_pretrained`.
            memory: of it `free_networks` and `shard_weights` have a meaning here.
            overrides: `config`, `text_encoder`, `clip_stats`, `variant`, `revision`, `subfolder`, `mirrors`, as for
                `unclip_jax.checkpoints.source.open_prior`.

        Raises:
            FileNotFoundError: when there is nothing at `source`.
            ValueError: for a file or an option that is refused.
        """
        known = ("config", "text_encoder", "clip_stats", "variant", "revision", "subfolder", "mirrors")
        if unknown := overrides.keys() - set(known):
            raise ValueError(f"unknown overrides {', '.join(sorted(unknown))}; accepted: {', '.join(known)}")
        mesh = local_mesh() if mesh is None else check_mesh(mesh)
        use_compilation_cache()
        with contextlib.ExitStack() as stack:
            prior = cls.from_checkpoint(stack.enter_context(open_prior(source, **overrides)), dtype, mesh, memory)
            if memory.free_networks:
                stack.pop_all()
            return prior

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, dtype: DTypeLike | None, mesh: Mesh, memory: Memory = DEFAULT_MEMORY
    ) -> "TextToEmbeddingPrior":
        """Fills the networks of an open checkpoint, parameter by parameter, straight onto their devices.

        With `memory.free_networks` nothing is read yet, and the checkpoint has to stay open as long as the prior.
        """
        config, dtype = prior_config(checkpoint), check_dtype(dtype, mesh)
        networks = open_networks(checkpoint, config, dtype, mesh, memory)
        mean, std = (np.asarray(checkpoint.params[f"image_normalizer.{n}"].read(), np.float32) for n in ("mean", "std"))
        residency = Residency(checkpoint) if memory.free_networks else None
        return cls(config, checkpoint.tokenizer, networks, (mean, std), mesh, dtype, residency)

    def __call__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """See `unclip_jax.pipelines.arguments.PriorArguments`."""
        return self.sample(check(self.config, PriorArguments(*args, **kwargs)))

    def encode_prompts(self, prompts: Sequence[str]) -> TextFeatures:
        """What the prior reads of P prompts, (P, ...) each. Equal prompts are encoded once."""
        prompts = list(prompts)
        unique = list(dict.fromkeys(prompts))
        tokens, mask = self.tokenizer.with_mask(unique)
        params = self._weights("text_encoder")
        bar = Progress("encoding prompts", len(tokens), unit="input", enabled=self.progress)
        described = one_by_one(self.mesh, self.embed_text, params, tokens, bar)
        states, embeds = (np.asarray(array, np.float32) for array in described)
        places = [unique.index(prompt) for prompt in prompts]
        return TextFeatures(states[places], embeds[places], mask[places])

    def sample(self, request: PriorRequest) -> np.ndarray:
        """The embeddings (B, D) of a checked request."""
        text, negative = request.text, request.negative
        if text is None:
            text = self.encode_prompts(request.prompts or [])
        if negative is None and request.guidance.unconditional:
            negative = self.encode_prompts([""])
        with Progress("sampling embeddings", request.batch, unit="image", enabled=self.progress) as bar:
            made = []
            for first in range(0, request.batch, request.batch_size):
                rows = np.arange(first, min(first + request.batch_size, request.batch))
                chunk = make_chunk(self.mesh, rows, request.repeats, request.seeds, request.indices)
                made.append(self._sample_chunk(request, text, negative, chunk))
                bar.update(chunk.count)
        return np.concatenate(made)

    def _sample_chunk(
        self, request: PriorRequest, text: TextFeatures, negative: TextFeatures | None, chunk: Chunk
    ) -> np.ndarray:
        def of_prompts(features: TextFeatures) -> TextFeatures:
            return TextFeatures(*map(chunk.of_prompts, features))

        embeds = self.run(
            self._weights("prior"),
            request.solver,
            of_prompts(text),
            None if negative is None or not request.guidance.unconditional else of_prompts(negative),
            None if request.latents is None else chunk.of_images(request.latents),
            None if request.step_noise is None else chunk.by_call(request.step_noise),
            chunk.seeds,
            chunk.indices,
            chunk.everywhere(request.guidance_scale),
            self.statistics,
            guidance=request.guidance,
            dim=self.config.prior.embedding_dim,
        )
        return chunk.trim(embeds)

    def _weights(self, name: str) -> Mapping[str, jax.Array]:
        if self.residency is None:
            return self.networks[name].params
        return self.residency.weights(name, self.networks[name], self.mesh, self.progress)


signed(TextToEmbeddingPrior.__call__, PriorArguments, "")


def check(config: PriorCheckpointConfig, a: PriorArguments) -> PriorRequest:
    """Checks every argument; touches no device. Raises ValueError."""
    if (a.prompt is None) == (a.text_features is None):
        found = "got neither" if a.prompt is None else "not both"
        raise ValueError(f"give one of prompt and text_features, {found}")
    prompts, text, negative = None, None, None
    if a.prompt is None:
        text = _check_features(config, "text_features", a.text_features, None)
        count = len(text.embeds)
        if not count:
            raise ValueError("text_features has no rows")
    else:
        count = count_texts("prompt", a.prompt)
        prompts = check_prompts("prompt", a.prompt, count)
    if a.negative_text_features is not None:
        negative = _check_features(config, "negative_text_features", a.negative_text_features, count)
    repeats = check_integer("num_images_per_prompt", a.num_images_per_prompt, 1, MAX_IMAGES)
    steps = check_integer("prior_num_inference_steps", a.prior_num_inference_steps, 1, 1000)
    try:
        solver = prior_solver(config.scheduler_config, steps, config.reference)
    except ValueError as error:
        raise ValueError(f"prior_{error}" if str(error).startswith("num_inference_steps") else str(error)) from None
    scale = a.prior_guidance_scale
    if not is_number(scale) or not math.isfinite(scale):
        raise ValueError(f"prior_guidance_scale is {scale!r:.80}; want a finite number")
    batch, dim = count * repeats, config.prior.embedding_dim
    seeds, indices = check_seed(a.seed, count, repeats)
    step_noise = optional_array("prior_step_noise", a.prior_step_noise, (solver.calls, batch, dim))
    if step_noise is not None and not solver.stochastic:
        kind = config.scheduler_config.get("_class_name")
        raise ValueError(f"prior_step_noise is given, but this prior's scheduler, {kind}, takes none")
    size = batch if a.batch_size is None else check_integer("batch_size", a.batch_size, 1, MAX_IMAGES)
    return PriorRequest(
        prompts=prompts,
        text=text,
        negative=negative,
        batch=batch,
        repeats=repeats,
        solver=solver,
        guidance=Guidance(unconditional=bool(scale != 1 if config.reference == Reference.ORIGINAL else scale > 1)),
        guidance_scale=np.float32(scale),
        latents=optional_array("prior_latents", a.prior_latents, (batch, dim)),
        step_noise=step_noise,
        seeds=seeds,
        indices=indices,
        batch_size=min(size, batch),
    )


def _check_features(config: PriorCheckpointConfig, name: str, value: Any, rows: int | None) -> TextFeatures:
    """rows: how many, beside one for all; None for any number."""
    if not isinstance(value, tuple) or len(value) != 3:
        raise ValueError(f"{name} is {type(value).__name__}; want TextFeatures: states, embeds and mask")
    length, dim = config.prior.context_length, config.prior.embedding_dim
    counts = [None] if rows is None else [rows, 1]
    states = check_array(f"{name}.states", value[0], *((count, length, dim) for count in counts))
    embeds = check_array(f"{name}.embeds", value[1], (len(states), dim))
    mask = check_array(f"{name}.mask", value[2], (len(states), length)) != 0
    if not mask[:, :1].all():
        raise ValueError(f"{name}.mask hides the first token of a text; want true up to its end token")
    return TextFeatures(states, embeds, mask)


def _run(
    prior: Network,
    params: Mapping[str, jax.Array],
    solver: Solver,
    text: TextFeatures,
    negative: TextFeatures | None,
    latents: jax.Array | None,
    step_noise: jax.Array | None,
    seeds: jax.Array,
    indices: jax.Array,
    scale: jax.Array,
    statistics: tuple[jax.Array, jax.Array],
    *,
    guidance: Guidance,
    dim: int,
) -> jax.Array:
    """The whole loop: (B, D) float32, un-normalised. text, negative: B rows; negative is read under guidance."""
    model = prior.merge(params)
    keys = branch(image_keys(seeds, indices), Branch.PRIOR)
    if latents is None:
        latents = draw(keys, Branch.LATENTS, (dim,))
    unconditional = [None] * 3 if negative is None else negative
    context = model.encode_text(*(guidance_rows(guidance, u, c) for u, c in zip(unconditional, text, strict=True)))
    times = model.embed_time(jnp.asarray(solver.grid["timestep"]))

    def network(x: jax.Array, row: Row, perturbed: jax.Array | None) -> jax.Array:
        return model.denoise(x, times[row["index"]], context)

    rows = {name: jnp.asarray(column) for name, column in solver.grid.items()}
    rows["guidance_scale"] = jnp.broadcast_to(scale, (solver.calls,))
    if step_noise is not None and solver.stochastic:
        rows["step_noise"] = step_noise
    denoise = guided(network, guidance, solver.prediction_type)
    mean, std = statistics
    return run_stateful_steps(denoise, solver, start(solver, latents), rows, keys).latents * std + mean
