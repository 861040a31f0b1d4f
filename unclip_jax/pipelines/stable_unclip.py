"""Text to image through a prior: a prompt becomes a CLIP image embedding, of which an unCLIP checkpoint makes pictures.

prompt -> prior -> image embedding -> noised to a level -> class label --+
prompt -> text encoder ----------------------------------> text states --+-> denoising loop -> VAE -> images

Source: unCLIP, Ramesh et al. 2022, arXiv:2204.06125; diffusers' StableUnCLIPPipeline.
"""

import os
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from unclip_jax.pipelines import arguments as check
from unclip_jax.pipelines.arguments import ProjectedGuidance
from unclip_jax.pipelines.memory import Memory
from unclip_jax.pipelines.pipeline import DEFAULT_MEMORY, PipelineOutput, StreamState
from unclip_jax.pipelines.prior import TextToEmbeddingPrior
from unclip_jax.pipelines.request import OutputType
from unclip_jax.pipelines.unclip import UnCLIPPipeline
from unclip_jax.sampling.solvers import Solver


class StableUnCLIPPipeline:
    """A prior and an unCLIP checkpoint whose image embeddings are of one CLIP model.

    prior, unclip: the two pipelines, public; set `progress` on either. Raises ValueError for embeddings of two widths.
    """

    def __init__(self, prior: TextToEmbeddingPrior, unclip: UnCLIPPipeline):
        made, taken = prior.config.prior.embedding_dim, unclip.config.image_embedding_dim
        if made != taken:
            raise ValueError(
                f"the prior makes image embeddings of width {made}, the unCLIP checkpoint takes {taken}; Karlo's prior "
                "goes with the ViT-L checkpoint"
            )
        self.prior = prior
        self.unclip = unclip

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] | None = None,
        dtype: Any = None,
        mesh: Mesh | None = None,
        memory: Memory = DEFAULT_MEMORY,
        prior: str | os.PathLike[str] | None = None,
        **overrides: Any,
    ) -> "StableUnCLIPPipeline":
        """Opens both.

        source: of the unCLIP checkpoint, see `Pipeline.from_pretrained`, which has the other arguments, too. prior: see
            `TextToEmbeddingPrior.from_pretrained`; None: `source` is a diffusers folder that holds it as well.

        Raises FileNotFoundError when there is nothing there, ValueError for what is refused.
        """
        one = ("variant", "revision", "subfolder") if prior is None else ()
        shared = {name: value for name, value in overrides.items() if name in (*one, "mirrors")}
        prior = source if prior is None else prior
        if prior is None:
            raise ValueError("prior is missing: none comes with the demo model")
        unclip = UnCLIPPipeline.from_pretrained(source, dtype, mesh, memory, **overrides)
        return cls(TextToEmbeddingPrior.from_pretrained(prior, dtype, mesh, **shared), unclip)

    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        negative_prompt: str | Sequence[str] = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: Any = 10.0,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        pag_scale: float = 0.0,
        projected_guidance: ProjectedGuidance | None = None,
        noise_level: int = 0,
        num_images_per_prompt: int = 1,
        scheduler: str | Solver | None = None,
        eta: float = 0.0,
        seed: int = 0,
        prior_num_inference_steps: int = 25,
        prior_guidance_scale: float = 4.0,
        prior_latents: Any = None,
        prior_step_noise: Any = None,
        latents: Any = None,
        image_noise: Any = None,
        step_noise: Any = None,
        batch_size: int | None = None,
        output_type: OutputType = "pil",
    ) -> PipelineOutput:
        """Makes `num_images_per_prompt` pictures of each prompt; every picture has an embedding of its own.

        The prior sees the prompts alone: `negative_prompt` is of the unCLIP checkpoint. noise_level: 0..1000, of the
        embeddings. prior_*: see `TextToEmbeddingPrior`. The other arguments and what is raised: see `Pipeline`;
        latents, image_noise and step_noise are of B = prompts * num_images_per_prompt images.
        """
        return self.unclip(**self._embed({k: v for k, v in locals().items() if k != "self"}, self.unclip.check))

    def stream(self, **arguments: Any) -> Generator[StreamState, None, None]:
        """The same run as a generator, see `Pipeline.stream`; the embeddings are made when it is called."""
        return self.unclip.stream(**self._embed(arguments, self.unclip.stream))

    def _embed(self, arguments: dict[str, Any], refuse: Callable[..., Any]) -> dict[str, Any]:
        """What the unCLIP pipeline is to be called with: its own arguments, and the prior's embeddings.

        refuse: raises for what that pipeline does not take, and runs nothing.
        """
        own = {k: v for k, v in arguments.items() if not k.startswith("prior_")}
        prior = {k: v for k, v in arguments.items() if k.startswith("prior_")}
        prompt, repeats = arguments.get("prompt", ""), own.pop("num_images_per_prompt", 1)
        count = 1 if isinstance(prompt, str) or not isinstance(prompt, Sequence) else len(prompt)
        if count == 0:
            raise ValueError("prompt is an empty list")
        repeats = check.check_integer("num_images_per_prompt", repeats, 1, 1 << 20)
        for name in ("prompt", "negative_prompt"):
            texts = check.check_prompts(name, own.get(name, ""), count)
            own[name] = [text for text in texts for _ in range(repeats)]
        # Whatever the unCLIP pipeline refuses is refused before the prior runs.
        width = self.prior.config.prior.embedding_dim
        refuse(image_embeds=np.zeros((count * repeats, width), np.float32), **own)
        embeds = self.prior(
            prompt,
            num_images_per_prompt=repeats,
            seed=own.get("seed", 0),
            batch_size=own.get("batch_size"),
            **prior,
        )
        return {**own, "image_embeds": embeds}
