"""What a run of training is: the settings in the YAML file that `unclip-jax train` reads, with their defaults.

task: denoise
model: sd2-community/stable-diffusion-2-1-unclip
out: runs/cats
data: {image_folder: cats, resolution: 768, flip: true}
batch_size: 4
run: {total_steps: 2000}
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from unclip_jax.checkpoints.config import build
from unclip_jax.training.lora import ATTENTION
from unclip_jax.training.masks import WHOLE_SHARE
from unclip_jax.training.optimizer import Decay
from unclip_jax.training.run import RunOptions

Task = Literal["denoise", "lora", "controlnet", "textual-inversion", "autoencoder", "tiny-autoencoder", "clip"]


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The source of images: either `image_folder` or `tars` (webdataset).

    Args:
        image_folder: A folder of images.
        tars: webdataset's tar files.
        filters: column -> [least, most] of the metadata, each a number or null, such as {p_unsafe: [null, 0.1]}. The
            columns "width" and "height" exclude images that are too small.
        cache: A folder for the frozen networks' outputs for every image, written before the first step if it is not
            there. Images are then neither mirrored nor moved.
        resolution: Of the training images; null for the checkpoint's own.
        crop: How images that are not square are cut.
        flip: Mirror half of the images, at random.
        threads: The number of images read at a time.
        validation_folder: Images whose loss is measured at every checkpoint.
        validation_images: How many of them.

    Raises:
        ValueError: The settings contradict each other.
    """

    image_folder: str | None = None
    tars: tuple[str, ...] | None = None
    filters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cache: str | None = None
    resolution: int | None = None
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    threads: int = 8
    validation_folder: str | None = None
    validation_images: int = 64

    def __post_init__(self) -> None:
        if (self.image_folder is None) == (self.tars is None):
            raise ValueError("data: want either image_folder or tars")
        for column, limits in self.filters.items():
            fits = isinstance(limits, list | tuple) and len(limits) == 2
            if not fits or not all(x is None or isinstance(x, int | float) for x in limits):
                raise ValueError(f"data.filters: {column} is {limits!r}; want [least, most], numbers or null")
        if self.cache is not None and (self.flip or self.crop == "random"):
            raise ValueError(
                "data.cache is set; want flip: false and crop: center, since cached images stay as they are"
            )


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """AdamW; the defaults are the model card's. See `unclip_jax.training.optimizer`."""

    learning_rate: float = 1e-4
    warmup_steps: int = 10_000
    decay: Decay = "constant"
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: float | None = None
    accumulate: int = 1


@dataclasses.dataclass(frozen=True)
class ObjectiveSettings:
    """What a denoiser learns; see `unclip_jax.training.diffusion_objective.DiffusionObjective`.

    Args:
        prediction_type: null for the checkpoint's.
        becomes: Another task than the checkpoint's; the UNet's input gets channels whose weights start at zero.
        embedding_dropout: See `DiffusionObjective`.
        text_dropout: See `DiffusionObjective`.
        clean_share: See `DiffusionObjective`.
        min_snr_gamma: See `DiffusionObjective`.
        noise_offset: See `DiffusionObjective`.
        zero_snr: Rescale the betas so that the last timestep is pure noise (v_prediction only).
        whole_mask_share: See `unclip_jax.training.masks.random_mask`.
        depth_model: A checkpoint whose depth estimator makes the depth maps, if the trained one has none.
        max_low_res_level: See `DiffusionObjective`.
        original_image: The column of the metadata that names the file of another image: the one before the instruction,
            which is the text, for `instruct`; the one that the image is a map of, for `depth` and `normals`. It is cut
            and mirrored as the image is.
        trainable: A pattern of the UNet's trained parameters. The others are frozen, and the optimiser holds nothing
            for them.
    """

    prediction_type: str | None = None
    becomes: Literal["inpaint", "depth-to-image", "instruct", "depth", "normals"] | None = None
    embedding_dropout: float = 0.25
    text_dropout: float = 0.1
    clean_share: float = 0.0
    min_snr_gamma: float | None = None
    noise_offset: float = 0.0
    zero_snr: bool = False
    whole_mask_share: float = WHOLE_SHARE
    depth_model: str | None = None
    max_low_res_level: int = 350
    original_image: str = "original_image"
    trainable: str = ".*"


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """See `unclip_jax.training.lora.initial_lora`."""

    rank: int = 16
    alpha: float | None = None
    targets: str = ATTENTION


@dataclasses.dataclass(frozen=True)
class ControlNetSettings:
    """A ControlNet, which begins as a copy of the UNet's encoder. The checkpoint's own networks are frozen.

    Args:
        hint: What it reads of each image: "canny", its edges; or a column of the metadata with the name of an image
            file, such as "conditioning_image", which is cut and mirrored as the image is.
        low_threshold: Of the edges, see `unclip_jax.conditioning.canny`.
        high_threshold: Likewise.
        model: A ControlNet to start from instead.
    """

    hint: str = "canny"
    low_threshold: float = 100
    high_threshold: float = 200
    model: str | None = None


@dataclasses.dataclass(frozen=True)
class InversionSettings:
    """A textual inversion embedding.

    Args:
        placeholder: The word to write in prompts.
        initial_word: The word whose vectors it starts from.
        vectors: The number of its vectors.
        templates: Captions of the images, with {} for the word; an image's own text is not read.
    """

    placeholder: str = "<thing>"
    initial_word: str = "thing"
    vectors: int = 1
    templates: tuple[str, ...] = ("a photo of {}", "an image of {}", "a close-up of {}", "one {}", "{}")


@dataclasses.dataclass(frozen=True)
class AutoencoderSettings:
    """See `unclip_jax.training.vae_losses.autoencoding_losses`.

    perceptual_model: a checkpoint with an image encoder, whose embeddings are compared; null for none.
    """

    kl_weight: float = 1e-6
    gradient_weight: float = 0.0
    squared_weight: float = 0.0
    perceptual_model: str | None = None
    perceptual_weight: float = 0.1


@dataclasses.dataclass(frozen=True)
class TinyVAESettings:
    """A tiny autoencoder for the latents of the checkpoint's VAE, which is frozen.

    Args:
        width: Channels of all its levels.
        blocks: Its blocks per level, but for the one at full resolution, which has one.
        latent_weight: Of the squared error of its latents; see `unclip_jax.training.tiny_vae.distillation_losses`.
        squared_weight: Of the squared error of the decoded image, beside the absolute one.
        gradient_weight: Of `unclip_jax.training.vae_losses.gradient_difference`.
        model: A tiny autoencoder to start from instead.
    """

    width: int = 64
    blocks: int = 3
    latent_weight: float = 1.0
    squared_weight: float = 1.0
    gradient_weight: float = 0.5
    model: str | None = None


@dataclasses.dataclass(frozen=True)
class ClipSettings:
    """Which examples form pairs: "image-text", an image and its text; "image-image", images with the same text."""

    pairs: Literal["image-text", "image-image"] = "image-text"


@dataclasses.dataclass(frozen=True)
class SampleSettings:
    """Grids of images every `run.sample_every` steps, for the first validation images (or training images)."""

    images: int = 4
    steps: int = 20
    guidance_scale: float = 3.0


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """A training run.

    Args:
        task: What to train.
        model: The checkpoint to start from.
        out: The run's folder.
        data: The images.
        run: The length of the run, and what it writes.
        batch_size: Of all devices together.
        seed: Determines everything random.
        dtype: Of computation; trained weights are always float32.
        remat: Less memory, more time.
        devices: How many; null for all.
        random_start: What is trained starts from random weights; the checkpoint only gives the sizes.
        optimizer: AdamW's settings.
        objective: What a denoiser learns.
        lora: The adapter.
        controlnet: The ControlNet.
        inversion: The textual inversion embedding.
        autoencoder: The VAE's losses.
        tiny_vae: The tiny autoencoder.
        clip: CLIP's pairs.
        samples: Grids of images.
        reports: "tensorboard", "wandb:PROJECT".
        stages: Mappings of settings that override those above, one after the other, each starting from the weights of
            the one before, as the model card's runs went from 256 to 512 to 768 pixels.

    Raises:
        ValueError: A setting is out of range.
    """

    task: Task
    model: str
    out: str
    data: DataSettings
    run: RunOptions
    batch_size: int = 8
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    devices: int | None = None
    random_start: bool = False
    optimizer: OptimizerSettings = OptimizerSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    lora: LoraSettings = LoraSettings()
    controlnet: ControlNetSettings = ControlNetSettings()
    inversion: InversionSettings = InversionSettings()
    autoencoder: AutoencoderSettings = AutoencoderSettings()
    tiny_vae: TinyVAESettings = TinyVAESettings()
    clip: ClipSettings = ClipSettings()
    samples: SampleSettings = SampleSettings()
    reports: tuple[str, ...] = ()
    stages: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.batch_size < 1 or not 0 <= self.seed < 2**32:
            raise ValueError(f"batch_size is {self.batch_size}, seed {self.seed}; want at least 1, and 0 to 2**32 - 1")
        for report in self.reports:
            if report != "tensorboard" and not report.startswith("wandb:"):
                raise ValueError(f"reports has {report!r}; accepted: tensorboard, wandb:PROJECT")

    def each_stage(self) -> list["TrainSettings"]:
        """The stages of this run, in order, each with a folder of its own; the run itself if it has none."""
        if not self.stages:
            return [self]
        whole = dataclasses.asdict(self) | {"stages": ()}
        return [
            _settings(_override(whole, stage) | {"out": str(Path(self.out) / f"stage-{number}")})
            for number, stage in enumerate(self.stages, 1)
        ]


def read_settings(path: Path, overrides: Sequence[str] = ()) -> TrainSettings:
    """Reads settings from a YAML file, with overrides such as "optimizer.learning_rate=1e-5".

    Args:
        path: The file.
        overrides: KEY=VALUE each.

    Returns:
        The settings.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A setting is unknown, missing, or of another type. The message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"CONFIG: no such file: {path}")
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path.name}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path.name} is not a mapping of settings")
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise ValueError(f"--set is {override!r}; want KEY=VALUE")
        nested: Any = _number(yaml.safe_load(text))
        for key in reversed(name.split(".")):
            nested = {key: nested}
        data = _override(data, nested)
    return _settings(data)


def _settings(data: Mapping[str, Any]) -> TrainSettings:
    return build(TrainSettings, _numbers(data), "settings", largest=math.inf)


def _override(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings merged, `top` winning."""
    merged = dict(base)
    for key, value in top.items():
        deeper = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _override(merged[key], value) if deeper else value
    return merged


def _numbers(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _numbers(value) for key, value in data.items()}
    return [_numbers(item) for item in data] if isinstance(data, list | tuple) else _number(data)


def _number(value: Any) -> Any:
    """A number that YAML 1.1 reads as a string, such as 1e-4."""
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() else value
        except ValueError:
            return value
    return value
