"""The model card of a checkpoint that is put on the hub: what its configuration and its sources say, and no more."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

import unclip_jax
from convert.architecture.diffusers import PIPELINES, PRIOR_PIPELINE
from convert.architecture.presets import PRESETS
from unclip_jax.checkpoints.checkpoint import Checkpoint, family_config, task_of
from unclip_jax.checkpoints.config import (
    ESTIMATES,
    AnyConfig,
    CheckpointConfig,
    ControlNetCheckpointConfig,
    PriorCheckpointConfig,
    Task,
    TinyVAECheckpointConfig,
)
from unclip_jax.checkpoints.places import cached_place
from unclip_jax.checkpoints.strict_json import read_object
from unclip_jax.demo import demo_model
from unclip_jax.models.configs import UNetConfig

LICENCE = "https://github.com/Stability-AI/stablediffusion/blob/main/LICENSE-MODEL"
# The hub's names of what a model does; it has none for surface normals, which are images made from images.
PIPELINE_TAGS: dict[Task, str] = dict.fromkeys(PIPELINES, "image-to-image") | {
    "text-to-image": "text-to-image",
    "depth": "depth-estimation",
}
PURPOSES: dict[Task, str] = {
    "variations": "variations of images (Stable unCLIP)",
    "text-to-image": "text to image",
    "depth-to-image": "depth to image",
    "upscale": "upscaling images by four",
    "inpaint": "inpainting",
    "depth": "estimating depth",
    "normals": "estimating surface normals",
    "instruct": "editing images by instructions",
}


def model_card(
    checkpoint: Checkpoint, repo_id: str, sources: Sequence[str] | None = None, method: str | None = None
) -> str:
    """The text of README.md, with the metadata that the hub reads.

    Args:
        checkpoint: The open checkpoint.
        repo_id: Where it goes.
        sources: What it was made from, as in `Checkpoint.sources`, which is the default.
        method: How it was made of them, where weights were changed.

    Returns:
        The text.

    Raises:
        ValueError: The checkpoint is of a kind that diffusers has no folder for.
    """
    made_from = [_Source(Path(source)) for source in (checkpoint.sources if sources is None else sources)]
    purpose, cls, tag = _purpose(checkpoint)
    licence, restriction = _licence(checkpoint.config, made_from)
    places = [place for source in made_from if (place := cached_place(source.path)) is not None]
    bases = list(dict.fromkeys(place.repo_id for place in places if place.repo_id != repo_id))
    metadata: dict[str, Any] = {
        "license": licence,
        "base_model": bases,
        "library_name": "diffusers",
        "pipeline_tag": tag,
        "tags": ["stable-diffusion", "unclip_jax"],
    }
    front = yaml.safe_dump({key: value for key, value in metadata.items() if value}, sort_keys=False)
    parts = [
        f"---\n{front}---",
        f"# {repo_id.partition('/')[2]}",
        f"A checkpoint for {purpose}, in a folder that diffusers' `{cls}` opens. {_facts(checkpoint)}",
        f"```python\n{_opened(checkpoint.config, repo_id)}\n```",
        "## Made from",
        "\n".join(f"- {source.described}" for source in made_from),
        _changes(method),
        "## Data",
        _data(made_from),
        "## Use",
        restriction,
    ]
    return "\n\n".join(parts) + "\n"


@dataclasses.dataclass(frozen=True)
class _Source:
    """What a checkpoint was made from. Of a file or folder of somebody's machine only the name is told."""

    path: Path

    @property
    def demo(self) -> bool:
        return self.path == demo_model()

    @property
    def link(self) -> str | None:
        """The repository that it was downloaded from."""
        place = cached_place(self.path)
        return None if place is None else f"[{place.repo_id}](https://huggingface.co/{place.repo_id})"

    @property
    def described(self) -> str:
        if self.demo:
            return "the demo model of unclip_jax"
        if (place := cached_place(self.path)) is not None:
            within = f", of it `{place.path}`" if place.path else ""
            return f"{self.link}{within}, commit {place.revision}"
        recorded = "".join(f"; its provenance.json has {name}: {value}" for name, value in self._provenance().items())
        return f"`{self.path.name}`, which did not come from the hub{recorded}"

    def _provenance(self) -> dict[str, str]:
        """What a converted directory says of where it comes from."""
        try:
            recorded = read_object(self.path / "provenance.json")
        except (OSError, ValueError):
            return {}
        names = [name for name in ("source", "trained_from", "method") if name in recorded]
        return {name: " ".join(str(recorded[name]).split())[:200] for name in names}


def _purpose(checkpoint: Checkpoint) -> tuple[str, str, str | None]:
    """What the checkpoint is for, in words; diffusers' class; the hub's tag for it, if there is one."""
    match checkpoint.config:
        case PriorCheckpointConfig():
            return "a prior from texts to image embeddings", "PriorTransformer", None
        case ControlNetCheckpointConfig():
            return "a ControlNet", "ControlNetModel", "image-to-image"
        case TinyVAECheckpointConfig():
            return "a tiny autoencoder", "AutoencoderTiny", None
        case _:
            config, task = family_config(checkpoint), task_of(checkpoint)
            encoder_less = task == "variations" and config.image_encoder is None
            cls, _ = PRIOR_PIPELINE if encoder_less else PIPELINES[task]
            return PURPOSES[task], cls, PIPELINE_TAGS[task]


def _facts(checkpoint: Checkpoint) -> str:
    numbers = sum(part["parameters"] for part in checkpoint.describe()["parts"].values())
    facts = f"{numbers / 1e6:,.1f} million weights."
    if isinstance(config := checkpoint.config, CheckpointConfig):
        size = config.unet.sample_size * config.vae.factor
        predicts = config.scheduler_config.get("prediction_type", "epsilon")
        facts += f" The UNet predicts {predicts}; its images are {size}x{size} pixels if no other size is asked for."
    return facts


def _opened(config: AnyConfig, repo_id: str) -> str:
    name = "from_pretrained"
    if isinstance(config, PriorCheckpointConfig):
        name = "TextToEmbeddingPrior.from_pretrained"
    if isinstance(config, ControlNetCheckpointConfig):
        name = "ControlNet.from_pretrained"
    if isinstance(config, TinyVAECheckpointConfig):
        name = "TinyVAE.from_pretrained"
    return f'import unclip_jax\n\nmodel = unclip_jax.{name}("{repo_id}")'


def _changes(method: str | None) -> str:
    written = f"Written by unclip_jax {unclip_jax.__version__}, which changes names and layouts of tensors."
    if method is not None:
        return f"{written} The weights' numbers were changed, too: {method}."
    return f"{written} Their numbers are the source's, but for their dtype and for what was trained since."


def _data(made_from: Sequence[_Source]) -> str:
    if all(source.demo for source in made_from):
        return (
            "The demo model was trained on drawings of emoji with free licences, which its NOTICES.md lists. Of what "
            "was trained since nothing is recorded here."
        )
    links = dict.fromkeys(source.link for source in made_from if source.link)
    cards = f" See the card of {', '.join(links)}." if links else ""
    return f"Nothing is recorded here about the data that the weights were trained on.{cards}"


def _licence(config: AnyConfig, made_from: Sequence[_Source]) -> tuple[str | None, str]:
    """The hub's name of the licence, None where none is known, and what the card says of it."""
    if all(source.demo for source in made_from):
        return "mit", "The weights are under the MIT licence of unclip_jax."
    if not _of_stable_diffusion_2(config):
        return None, "What the weights were made from has licences of its own, which are not recorded here."
    return "openrail++", (
        "The networks have the sizes of Stable Diffusion 2's. Its weights, and all that is made from them, are under "
        f"the [CreativeML Open RAIL++-M licence]({LICENCE}), which restricts their use: its attachment A lists what is "
        "not allowed. Whoever passes them on includes the licence and binds the recipients to these restrictions."
    )


def _of_stable_diffusion_2(config: AnyConfig) -> bool:
    """Whether a UNet or ControlNet is as large as a published one whose licence its fine-tunes have, too.

    sd-turbo has another licence, and of the estimators some have.
    """
    unet: UNetConfig
    match config:
        case ControlNetCheckpointConfig():
            unet = config.controlnet.unet
        case CheckpointConfig() if not config.distilled and config.trained_for not in ESTIMATES:
            unet = config.unet
        case _:
            return False
    sizes = {(known.unet.block_out_channels, known.unet.cross_attention_dim) for known in PRESETS.values()}
    return (unet.block_out_channels, unet.cross_attention_dim) in sizes
