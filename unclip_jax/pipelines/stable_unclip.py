"""Text to image through a prior: a prompt becomes a CLIP image embedding, of which an unCLIP checkpoint makes images.

prompt -> prior -> image embedding -> noised to a level -> class labels --+
prompt -> text encoder ----------------------------------> text states ---+-> denoising loop -> VAE -> images

Source: unCLIP, Ramesh et al. 2022, arXiv:2204.06125; diffusers' StableUnCLIPPipeline.
"""

import dataclasses
import functools
import os
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from unclip_jax.checkpoints.checkpoint import Checkpoint
from unclip_jax.checkpoints.config import CheckpointConfig, PriorCheckpointConfig
from unclip_jax.pipelines import prior as priors
from unclip_jax.pipelines import unclip
from unclip_jax.pipelines.arguments import PriorArguments, StableUnCLIPArguments, UnCLIPArguments
from unclip_jax.pipelines.checks import MAX_IMAGES, check_integer, check_prompts, check_seed, count_texts, with_inputs
from unclip_jax.pipelines.memory import Memory
from unclip_jax.pipelines.opening import DEFAULT_MEMORY
from unclip_jax.pipelines.parts import Parts
from unclip_jax.pipelines.pipeline import Pipeline, calls, streams
from unclip_jax.pipelines.prior import PriorRequest, TextToEmbeddingPrior
from unclip_jax.pipelines.request import Conditions, Request, Task


@dataclasses.dataclass(frozen=True)
class Inputs:
    """unclip: what variations have, with zeros in the place of the embeddings that the prior will make."""

    prior: PriorRequest
    unclip: unclip.Inputs


def check(prior: PriorCheckpointConfig, config: CheckpointConfig, a: StableUnCLIPArguments) -> Request[Inputs]:
    """Checks every argument, the prior's too; touches no device. Raises ValueError."""
    count = count_texts("prompt", a.prompt)
    repeats = check_integer("num_images_per_prompt", a.num_images_per_prompt, 1, MAX_IMAGES)

    def one_each(name: str, value: Any) -> list[str]:
        return [text for text in check_prompts(name, value, count) for _ in range(repeats)]

    # To the unCLIP checkpoint every image is one of its own, with a prompt and an embedding.
    shared = {field.name for field in dataclasses.fields(a)} & {f.name for f in dataclasses.fields(UnCLIPArguments)}
    own = {name: getattr(a, name) for name in shared} | {"num_images_per_prompt": 1}
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        if own[name] is not None and np.shape(own[name])[:1] == (count,):
            own[name] = np.repeat(own[name], repeats, axis=0)
    own |= {name: one_each(name, own[name]) for name in ("prompt", "negative_prompt")} | {"seed": 0}
    own["image_embeds"] = np.zeros((count * repeats, prior.prior.embedding_dim), np.float32)
    request = unclip.check(config, UnCLIPArguments(**own))
    of_prior = {name: getattr(a, name) for name in (*_PRIOR, "prompt", "num_images_per_prompt", "seed", "batch_size")}
    inputs = Inputs(priors.check(prior, PriorArguments(**of_prior)), request.inputs)
    seeds, indices = check_seed(a.seed, count, repeats)
    return with_inputs(request, inputs, seeds=seeds, indices=indices)


_PRIOR = ("prior_num_inference_steps", "prior_guidance_scale", "prior_latents", "prior_step_noise")


def conditions(prior: TextToEmbeddingPrior, parts: Parts, request: Request[Inputs]) -> Conditions:
    """What the denoiser is told: runs the prior."""
    inputs = request.inputs
    asked = dataclasses.replace(inputs.prior, seeds=request.seeds, indices=request.indices)
    condition = dataclasses.replace(inputs.unclip.condition, image_embeds=prior.sample(asked))
    own = dataclasses.replace(inputs.unclip, condition=condition)
    return unclip.conditions(parts, with_inputs(request, own))


class StableUnCLIPPipeline(Pipeline):
    """An unCLIP checkpoint with a prior, whose image embeddings are of one CLIP model.

    Args:
        prior: a `TextToEmbeddingPrior`, public, with a `progress` of its own.
        unclip: an `UnCLIPPipeline`, whose networks this pipeline takes.

    Raises:
        ValueError: for embeddings of two widths.
    """

    accepts = ("variations",)
    diffusers_class = "StableUnCLIPImg2ImgPipeline"

    @calls(StableUnCLIPArguments)
    def __call__(self) -> Any: ...

    @streams(StableUnCLIPArguments)
    def stream(self) -> Any: ...

    def __init__(self, prior: TextToEmbeddingPrior, unclip: unclip.UnCLIPPipeline):
        made, taken = prior.config.prior.embedding_dim, unclip.config.image_embedding_dim
        if made != taken:
            raise ValueError(
                f"the prior makes image embeddings of width {made}, the unCLIP checkpoint takes {taken}; Karlo's prior "
                "goes with the ViT-L checkpoint"
            )
        super().__init__(unclip.opened)
        self.programs = unclip.programs
        self.prior = prior
        self.task = Task(
            StableUnCLIPArguments, functools.partial(check, prior.config), functools.partial(conditions, prior)
        )

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] | None = None,
        dtype: DTypeLike | None = None,
        mesh: Mesh | None = None,
        memory: Memory = DEFAULT_MEMORY,
        prior: str | os.PathLike[str] | None = None,
        **overrides: Any,
    ) -> "StableUnCLIPPipeline":
        """Opens both.

        Args:
            source: of the unCLIP checkpoint; it and the other arguments are those of `Pipeline.from_pretrained`.
            prior: as for `TextToEmbeddingPrior.from_pretrained`. None: `source` is a diffusers folder that holds it as
                well.

        Raises:
            FileNotFoundError: when there is nothing there.
            ValueError: for what is refused.
        """
        one = ("variant", "revision", "subfolder") if prior is None else ()
        shared = {name: value for name, value in overrides.items() if name in (*one, "mirrors")}
        prior = source if prior is None else prior
        if prior is None:
            raise ValueError("prior is required: the demo model does not include one")
        images = unclip.UnCLIPPipeline.from_pretrained(source, dtype, mesh, memory, **overrides)
        return cls(TextToEmbeddingPrior.from_pretrained(prior, dtype, mesh, memory, **shared), images)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        dtype: DTypeLike | None = None,
        mesh: Mesh | None = None,
        memory: Memory = DEFAULT_MEMORY,
        prior: Checkpoint | None = None,
    ) -> "StableUnCLIPPipeline":
        """Fills the networks of two open checkpoints, see `Pipeline.from_checkpoint`. Raises ValueError."""
        if prior is None:
            raise ValueError("prior is required: an open checkpoint of a text-to-embedding prior")
        images = unclip.UnCLIPPipeline.from_checkpoint(checkpoint, dtype, mesh, memory)
        return cls(TextToEmbeddingPrior.from_checkpoint(prior, dtype, images.mesh, memory), images)
