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

Task = Literal["denoise", "lora", "textual-inversion", "autoencoder", "clip"]


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Where images come from: `image_folder`, or `tars` (webdataset), one of them.

    filters: column -> [least, most], each a number or null, of the metadata, such as {p_unsafe: [null, 0.1]}; "width"
    and "height" among the columns leave out what is too small. cache: a folder for what the frozen networks say of
    every image, which is written there before the first step, if it is not there yet; images are then neither
    mirrored nor moved. resolution: of the training images, null for the checkpoint's own. crop: of what is not
    square. validation_folder: images of which the loss is measured at every checkpoint.
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
            raise ValueError("data: give image_folder or tars, one of them")
        for column, limits in self.filters.items():
            fits = isinstance(limits, list | tuple) and len(limits) == 2
            if not fits or not all(x is None or isinstance(x, int | float) for x in limits):
                raise ValueError(f"data.filters: {column} is {limits!r}; want [least, most], numbers or null")
        if self.cache is not None and (self.flip or self.crop == "random"):
            raise ValueError("data.cache: what is cached cannot be mirrored or moved: no flip, and crop: center")


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
    """What a denoiser learns; see `unclip_jax.training.diffusion_objective.Denoising`.

    prediction_type: null for the checkpoint's. becomes: another task than the checkpoint's, for which the UNet's input
    gets channels whose weights begin as zeros. zero_snr: whether the betas are rescaled so that the last timestep is
    pure noise (v_prediction only). trainable: a pattern of the UNet's parameters that are trained; the others are
    frozen, and the optimiser holds nothing of them. depth_model: a checkpoint whose depth estimator makes the depth
    maps, where the one to train has none.
    """

    prediction_type: str | None = None
    becomes: Literal["inpaint", "depth-to-image"] | None = None
    embedding_dropout: float = 0.25
    text_dropout: float = 0.1
    clean_share: float = 0.0
    min_snr_gamma: float | None = None
    noise_offset: float = 0.0
    zero_snr: bool = False
    whole_mask_share: float = WHOLE_SHARE
    depth_model: str | None = None
    max_low_res_level: int = 350
    trainable: str = ".*"


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """See `unclip_jax.training.lora.initial_lora`."""

    rank: int = 16
    alpha: float | None = None
    targets: str = ATTENTION


@dataclasses.dataclass(frozen=True)
class InversionSettings:
    """A new word: what is written in prompts, the word whose vectors it begins as, and how many vectors it is.

    templates: captions of the images, with {} for the word; an image's own text is not read.
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
class ClipSettings:
    """What belongs together: "image-text" an image and its text; "image-image" images of one text."""

    pairs: Literal["image-text", "image-image"] = "image-text"


@dataclasses.dataclass(frozen=True)
class SampleSettings:
    """Grids of images every `run.sample_every` steps: of the first validation images (or the training's)."""

    images: int = 4
    steps: int = 20
    guidance_scale: float = 3.0


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """A run. dtype: of computation; weights that are trained are float32 always. remat: less memory, more time.
    random_start: what is trained begins from random weights; the checkpoint says how large it is.

    batch_size: of all devices together. stages: mappings of settings that take the place of those above, one after
    the other, each from the weights of the one before: as the model card's runs went from 256 to 512 to 768 pixels.
    reports: "tensorboard", "wandb:PROJECT". devices: how many, null for all.
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
    inversion: InversionSettings = InversionSettings()
    autoencoder: AutoencoderSettings = AutoencoderSettings()
    clip: ClipSettings = ClipSettings()
    samples: SampleSettings = SampleSettings()
    reports: tuple[str, ...] = ()
    stages: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.batch_size < 1 or not 0 <= self.seed < 2**32:
            raise ValueError(f"batch_size {self.batch_size}, seed {self.seed}: want at least 1, and 0 to 2**32 - 1")
        for report in self.reports:
            if report != "tensorboard" and not report.startswith("wandb:"):
                raise ValueError(f"reports: {report!r}; accepted: tensorboard, wandb:PROJECT")

    def each_stage(self) -> list["TrainSettings"]:
        """The runs that this one consists of, in order, each in a folder of its own; itself without stages."""
        if not self.stages:
            return [self]
        whole = dataclasses.asdict(self) | {"stages": ()}
        return [
            _settings(_override(whole, stage) | {"out": str(Path(self.out) / f"stage-{number}")})
            for number, stage in enumerate(self.stages, 1)
        ]


def read_settings(path: Path, overrides: Sequence[str] = ()) -> TrainSettings:
    """Settings from a YAML file, with overrides such as "optimizer.learning_rate=1e-5".

    Raises FileNotFoundError; ValueError, naming the setting, for what is unknown, missing, or of another type.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"CONFIG: no such file: {path}")
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path.name}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path.name}: want settings by name")
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise ValueError(f"--set {override!r}: want KEY=VALUE")
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
    """YAML 1.1 takes 1e-4 for a string; we do not."""
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() else value
        except ValueError:
            return value
    return value
