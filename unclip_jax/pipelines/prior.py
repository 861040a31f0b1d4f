"""The unCLIP prior: prompts in, CLIP image embeddings out, for an unCLIP pipeline's `image_embeds`.

prompts -> tokens -> CLIP's text tower -> its states, embedding and mask -> denoising loop -> image embeddings
"""

import dataclasses
import functools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from unclip_jax.checkpoints.checkpoint import Checkpoint, prior_config
from unclip_jax.checkpoints.config import PriorCheckpointConfig
from unclip_jax.checkpoints.loading import load_networks
from unclip_jax.checkpoints.networks import Network, abstract_networks
from unclip_jax.checkpoints.source import open_prior
from unclip_jax.compilation import use_compilation_cache
from unclip_jax.conditioning.tokenizer import Tokenizer
from unclip_jax.distributed import mesh as placement
from unclip_jax.pipelines import arguments as check
from unclip_jax.pipelines.pipeline import check_dtype
from unclip_jax.progress import Progress
from unclip_jax.sampling.guidance import double, guide, interleave
from unclip_jax.sampling.loop import sample
from unclip_jax.sampling.noise import Branch, branch, draw, image_keys
from unclip_jax.sampling.solvers import Solver
from unclip_jax.sampling.solvers.unclip_scheduler import prior_solver


class TextFeatures(NamedTuple):
    """What the prior reads of B texts: `TextToEmbeddingPrior.encode_prompts` makes them.

    states: (B, S, D) float32, of CLIP's text tower after its final norm; embeds: (B, D) float32, un-normalised; mask:
    (B, S) bool, true up to and including the end token.
    """

    states: Any
    embeds: Any
    mask: Any


@dataclasses.dataclass(frozen=True)
class _Request:
    """A checked call, as host arrays; B = P * repeats."""

    prompts: list[str] | None
    text: TextFeatures | None  # of P prompts
    negative: TextFeatures | None  # of 1 or P
    batch: int
    repeats: int
    solver: Solver
    guided: bool
    guidance_scale: np.float32
    latents: np.ndarray | None  # (B, D)
    step_noise: np.ndarray | None  # (calls, B, D)
    seed: int
    batch_size: int


class TextToEmbeddingPrior:
    """Makes CLIP image embeddings of prompts. Build it with `from_pretrained` and call it.

    config, tokenizer, networks ("prior" and "text_encoder"), mesh and dtype are public. Set `progress` to False for
    silence.
    """

    def __init__(
        self,
        config: PriorCheckpointConfig,
        tokenizer: Tokenizer,
        networks: Mapping[str, Network],
        statistics: tuple[np.ndarray, np.ndarray],
        mesh: Mesh,
        dtype: Any,
    ):
        self.config = config
        self.tokenizer = tokenizer
        self.networks = dict(networks)
        self.mesh = mesh
        self.dtype = dtype
        self.progress = True
        self._statistics = jax.device_put(statistics, placement.replicated(mesh))
        text = networks["text_encoder"]
        self._describe = jax.jit(lambda params, tokens: text.merge(params).describe(tokens))
        self._run = jax.jit(functools.partial(_run, networks["prior"]), static_argnames=("guided", "dim"))

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], dtype: Any = None, mesh: Mesh | None = None, **overrides: Any
    ) -> "TextToEmbeddingPrior":
        """Opens a prior and puts its networks on the devices.

        source: a converted directory, a diffusers folder with the prior's parts, Karlo's own checkpoint, or a hub id.
        dtype, mesh: as for `unclip_jax.pipelines.unclip.UnCLIPPipeline.from_pretrained`.
        overrides: `config`, `text_encoder`, `clip_stats`, `variant`, `revision`, `subfolder`, `mirrors`, see
            `unclip_jax.checkpoints.source.open_prior`.

        Raises FileNotFoundError when there is nothing at `source`, ValueError for a file or option that is refused.
        """
        known = ("config", "text_encoder", "clip_stats", "variant", "revision", "subfolder", "mirrors")
        if unknown := overrides.keys() - set(known):
            raise ValueError(f"unknown overrides {', '.join(sorted(unknown))}; accepted: {', '.join(known)}")
        mesh = placement.local_mesh() if mesh is None else placement.check_mesh(mesh)
        use_compilation_cache()
        with open_prior(source, **overrides) as checkpoint:
            return cls.from_checkpoint(checkpoint, dtype, mesh)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, dtype: Any, mesh: Mesh) -> "TextToEmbeddingPrior":
        """Fills the networks of an open checkpoint, parameter by parameter, straight onto their devices."""
        config, dtype = prior_config(checkpoint), check_dtype(dtype, mesh)
        networks = load_networks(checkpoint, abstract_networks(config, dtype), mesh)
        mean, std = (np.asarray(checkpoint.params[f"image_normalizer.{n}"].read(), np.float32) for n in ("mean", "std"))
        return cls(config, checkpoint.tokenizer, networks, (mean, std), mesh, dtype)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        prior_num_inference_steps: int = 25,
        prior_guidance_scale: float = 4.0,
        prior_latents: Any = None,
        prior_step_noise: Any = None,
        seed: int = 0,
        text_features: TextFeatures | None = None,
        negative_text_features: TextFeatures | None = None,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Image embeddings of `num_images_per_prompt` pictures of each prompt: (B, D) float32, un-normalised.

        B = prompts * num_images_per_prompt, prompt-major. The network predicts the clean embedding; guidance is against
        the empty prompt, and what it gives is clipped as the scheduler says.

        prompt: a string, or a list of them; or instead
        text_features: of P prompts, as `encode_prompts` gives them
        negative_text_features: what guidance leads away from, one or P rows; None is the empty prompt's
        prior_num_inference_steps: 2..1000 (1 with schedulers that allow it)
        prior_guidance_scale: off at exactly 1 in Karlo's own checkpoints, at 1 and below in diffusers' folders
        prior_latents: (B, D) initial noise, standard normal
        prior_step_noise: (network calls, B, D), the noise of each step; the last step's is not used
        seed: 0..2**32 - 1; embedding i's noise comes from (seed, i) alone
        batch_size: embeddings a compiled call; None is all at once

        Raises ValueError for bad arguments, before anything is compiled.
        """
        request = self._check(**{k: v for k, v in locals().items() if k != "self"})
        text, negative = request.text, request.negative
        if text is None:
            assert request.prompts is not None
            text = self.encode_prompts(request.prompts)
        if negative is None and request.guided:
            negative = self.encode_prompts([""])
        with Progress("sampling embeddings", request.batch, unit="image", enabled=self.progress) as bar:
            made = []
            for first in range(0, request.batch, request.batch_size):
                chunk = np.arange(first, min(first + request.batch_size, request.batch))
                made.append(self._sample(request, text, negative, chunk))
                bar.update(len(chunk))
        return np.concatenate(made)

    @property
    def _reference(self) -> Literal["ldm", "diffusers"]:
        return "ldm" if self.config.dialect == "original" else "diffusers"

    def _check(
        self,
        prompt: Any,
        num_images_per_prompt: Any,
        prior_num_inference_steps: Any,
        prior_guidance_scale: Any,
        prior_latents: Any,
        prior_step_noise: Any,
        seed: Any,
        text_features: Any,
        negative_text_features: Any,
        batch_size: Any,
    ) -> _Request:
        """Raises ValueError, in one line by name, for anything that would fail later."""
        if (prompt is None) == (text_features is None):
            found = "got neither" if prompt is None else "not both"
            raise ValueError(f"give one of prompt and text_features, {found}")
        prompts, text, negative = None, None, None
        if prompt is None:
            text = self._check_features("text_features", text_features, None)
            count = len(text.embeds)
        else:
            count = 1 if isinstance(prompt, str) or not isinstance(prompt, Sequence) else len(prompt)
            prompts = check.check_prompts("prompt", prompt, count)
        if not count:
            raise ValueError(f"{'prompt is an empty list' if text is None else 'text_features has no rows'}")
        if negative_text_features is not None:
            negative = self._check_features("negative_text_features", negative_text_features, count)
        repeats = check.check_integer("num_images_per_prompt", num_images_per_prompt, 1, 1 << 20)
        steps = check.check_integer("prior_num_inference_steps", prior_num_inference_steps, 1, 1000)
        try:
            solver = prior_solver(self.config.scheduler_config, steps, self._reference)
        except ValueError as error:
            raise ValueError(f"prior_{error}" if str(error).startswith("num_inference_steps") else str(error)) from None
        scale = prior_guidance_scale
        number = isinstance(scale, int | float | np.integer | np.floating) and not isinstance(scale, bool)
        if not number or not math.isfinite(scale):
            raise ValueError(f"prior_guidance_scale is {scale!r:.80}; want a finite number")
        batch, dim = count * repeats, self.config.prior.embedding_dim
        shapes = {"prior_latents": (batch, dim), "prior_step_noise": (solver.calls, batch, dim)}
        given = {"prior_latents": prior_latents, "prior_step_noise": prior_step_noise}
        noise = {k: None if v is None else check.check_array(k, v, shapes[k]) for k, v in given.items()}
        if noise["prior_step_noise"] is not None and not solver.stochastic:
            kind = self.config.scheduler_config.get("_class_name")
            raise ValueError(f"prior_step_noise is given, but this prior's scheduler, {kind}, takes none")
        size = batch if batch_size is None else check.check_integer("batch_size", batch_size, 1, 1 << 20)
        return _Request(
            prompts=prompts,
            text=text,
            negative=negative,
            batch=batch,
            repeats=repeats,
            solver=solver,
            guided=bool(scale != 1 if self.config.dialect == "original" else scale > 1),
            guidance_scale=np.float32(scale),
            latents=noise["prior_latents"],
            step_noise=noise["prior_step_noise"],
            seed=check.check_integer("seed", seed, 0, check.MAX_SEED),
            batch_size=min(size, batch),
        )

    def _check_features(self, name: str, value: Any, rows: int | None) -> TextFeatures:
        """rows: how many, beside one for all; None for any number."""
        if not isinstance(value, tuple) or len(value) != 3:
            raise ValueError(f"{name} is {type(value).__name__}; want TextFeatures: states, embeds and mask")
        length, dim = self.config.prior.context_length, self.config.prior.embedding_dim
        states = check.check_array(f"{name}.states", value[0], *((n, length, dim) for n in {rows, rows and 1}))
        embeds = check.check_array(f"{name}.embeds", value[1], (len(states), dim))
        mask = check.check_array(f"{name}.mask", value[2], (len(states), length)) != 0
        if not mask[:, :1].all():
            raise ValueError(f"{name}.mask hides the first token of a text; want true up to its end token")
        return TextFeatures(states, embeds, mask)

    def encode_prompts(self, prompts: Sequence[str]) -> TextFeatures:
        """What the prior reads of P prompts, (P, ...) each. Equal prompts are encoded once."""
        prompts = list(prompts)
        unique = list(dict.fromkeys(prompts))
        tokens, mask = self.tokenizer.with_mask(unique)
        params, everywhere = self.networks["text_encoder"].params, placement.replicated(self.mesh)
        rows = [self._describe(params, jax.device_put(row[None], everywhere)) for row in tokens]
        states, embeds = (np.concatenate([np.asarray(row[i], np.float32) for row in rows]) for i in (0, 1))
        places = [unique.index(prompt) for prompt in prompts]
        return TextFeatures(states[places], embeds[places], mask[places])

    def _sample(
        self, request: _Request, text: TextFeatures, negative: TextFeatures | None, chunk: np.ndarray
    ) -> np.ndarray:
        """Some of a request's embeddings."""
        size = placement.data_size(self.mesh)
        rows = placement.pad_batch(chunk, -(-len(chunk) // size) * size)
        by_batch, everywhere = placement.batch_sharding(self.mesh), placement.replicated(self.mesh)
        by_call = NamedSharding(self.mesh, P(None, *by_batch.spec))
        noise, prompt = request.step_noise, rows // request.repeats

        def of_prompt(features: TextFeatures) -> TextFeatures:
            return TextFeatures(*(jax.device_put(a[np.minimum(prompt, len(a) - 1)], by_batch) for a in features))

        embeds = self._run(
            self.networks["prior"].params,
            request.solver,
            of_prompt(text),
            None if negative is None or not request.guided else of_prompt(negative),
            None if request.latents is None else jax.device_put(request.latents[rows], by_batch),
            None if noise is None else jax.device_put(noise[:, rows], by_call),
            jax.device_put(np.uint32(request.seed), everywhere),
            jax.device_put(rows.astype(np.int32), by_batch),
            jax.device_put(request.guidance_scale, everywhere),
            self._statistics,
            guided=request.guided,
            dim=self.config.prior.embedding_dim,
        )
        return np.asarray(embeds)[: len(chunk)]


def _run(
    prior: Network,
    params: Mapping[str, jax.Array],
    solver: Solver,
    text: TextFeatures,
    negative: TextFeatures | None,
    latents: jax.Array | None,
    step_noise: jax.Array | None,
    seed: jax.Array,
    indices: jax.Array,
    scale: jax.Array,
    statistics: tuple[jax.Array, jax.Array],
    *,
    guided: bool,
    dim: int,
) -> jax.Array:
    """The whole loop: (B, D) float32, un-normalised. text, negative: a row an embedding; negative is for guidance."""
    model = prior.merge(params)
    keys = branch(image_keys(seed, indices), Branch.PRIOR)
    if latents is None:
        latents = draw(keys, Branch.LATENTS, (dim,))
    if guided:
        assert negative is not None
        text = TextFeatures(*map(interleave, negative, text))
    context = model.encode_text(*text)
    times = model.embed_time(jnp.asarray(solver.grid["timestep"]))

    def denoise(x: jax.Array, row: Mapping[str, jax.Array]) -> jax.Array:
        out = model.denoise(double(x) if guided else x, times[row["index"]], context)
        return guide(out, scale) if guided else out.astype(jnp.float32)

    mean, std = statistics
    return sample(denoise, solver, latents, keys=keys, step_noise=step_noise) * std + mean
