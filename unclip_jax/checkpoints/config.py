"""What a checkpoint is: the architecture of each network, and everything else that is not a weight."""

import dataclasses
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, Literal

from unclip_jax.conditioning.clip_image import Preprocess
from unclip_jax.conditioning.tokenizer import Dialect as TokenizerDialect
from unclip_jax.models.configs import (
    AnyVAEConfig,
    AutoencoderTinyConfig,
    ControlNetConfig,
    DepthConfig,
    PriorConfig,
    TextConfig,
    UNetConfig,
    VisionConfig,
)
from unclip_jax.reference import Reference
from unclip_jax.sampling.schedule import PREDICTION_TYPES, NoiseSchedule

FORMAT_VERSION = 1

Task = Literal["variations", "text-to-image", "depth-to-image", "upscale", "inpaint", "depth", "normals", "instruct"]
# By the channels of the UNet's input: the latents' four, and a depth map, a small image, a mask with masked latents.
TASKS: dict[int, Task] = {4: "text-to-image", 5: "depth-to-image", 7: "upscale", 9: "inpaint"}
# Those whose UNets read another image's latents beside the own: eight channels. The networks do not tell which it is.
ESTIMATES: tuple[Task, ...] = ("depth", "normals")
OF_TWO_LATENTS: tuple[Task, ...] = (*ESTIMATES, "instruct")


@dataclasses.dataclass(frozen=True)
class EstimatorConfig:
    """How an estimator of depth or normals is run, and what its numbers mean.

    Args:
        prediction_type: What diffusers' folder says, such as "depth" or "normals". Of "disparity" larger is nearer.
        num_inference_steps: The default; None for none.
        processing_resolution: The longest side in pixels at which images are read, by default; None for none.
        scale_invariant: Whether a depth map is known up to a factor.
        shift_invariant: Whether it is known up to a constant.
        use_full_z_range: Whether normals may point away from the camera, so that their z is in -1..1 and not in 0..1.
        direct: Whether the UNet predicts the map itself, in one evaluation, and has a class embedding that tells it to,
            as Lotus' does. With four input channels it reads the image alone, and no noise.
    """

    prediction_type: str | None = None
    num_inference_steps: int | None = None
    processing_resolution: int | None = None
    scale_invariant: bool = True
    shift_invariant: bool = True
    use_full_z_range: bool = True
    direct: bool = False


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """A Stable Diffusion 2 checkpoint without its weights.

    Args:
        unet: The UNet's architecture.
        vae: The VAE's, which may be a tiny autoencoder.
        text_encoder: The text encoder's.
        image_encoder: The image encoder's; None for checkpoints without one.
        reference: The reference whose arithmetic it follows: "original" (Stability's code: tokenizer with text
            cleaning, float64 schedule tables, pixels truncated to 8 bits) or "diffusers" (transformers' tokenizer,
            float32 tables, pixels rounded).
        scheduler: The default solver's name.
        scheduler_config: The diffusers settings that solvers read.
        preprocess: How images become pixel values, see `unclip_jax.conditioning.clip_image.preprocess`.
        image_noising: The noise schedule of the conditioning image: of the image embedding, or of an upscaler's small
            image. None for the others.
        depth_estimator: The network that makes the depth map for depth-to-image; None for the others.
        distilled: Whether it makes an image in few steps without guidance, as sd-turbo does. A call that says nothing
            else then makes one step, unguided.
        trained_for: The task, where the UNet's input channels do not tell it: one of `OF_TWO_LATENTS`.
        estimator: How an estimator of depth or normals is run; None for the others.
    """

    unet: UNetConfig
    vae: AnyVAEConfig
    text_encoder: TextConfig
    image_encoder: VisionConfig | None
    reference: Reference
    scheduler: str
    scheduler_config: Mapping[str, Any]
    preprocess: Preprocess = "original"
    image_noising: NoiseSchedule | None = None
    depth_estimator: DepthConfig | None = None
    distilled: bool = False
    trained_for: Task | None = None
    estimator: EstimatorConfig | None = None

    @property
    def reads_two_latents(self) -> bool:
        """Whether the UNet reads another image's latents beside the own."""
        return self.unet.in_channels == 2 * self.vae.latent_channels and self.unet.in_channels not in TASKS

    @property
    def direct(self) -> bool:
        """Whether this is an estimator that predicts its map at once, see `EstimatorConfig`."""
        return self.estimator is not None and self.estimator.direct

    @property
    def image_first(self) -> bool:
        """Whether the UNet reads what it is given beside the latents before them, as estimators do."""
        return self.reads_two_latents and self.trained_for in ESTIMATES

    @property
    def task(self) -> Task:
        """The task that the networks were trained for: `trained_for`, or by the UNet's class labels and input channels.

        Raises:
            ValueError: The channels fit several tasks, and `trained_for` is None; or they fit none.
        """
        channels = self.unet.in_channels
        if self.trained_for in OF_TWO_LATENTS and (self.reads_two_latents or self.direct):
            return self.trained_for
        if self.direct:
            raise ValueError(f"it is an estimator for one of {', '.join(ESTIMATES)}; open it with the pipeline for it")
        if channels not in TASKS and channels != self.vae.latent_channels:
            raise ValueError(unknown_channels(channels))
        if self.image_embedding_dim is not None:
            return "variations"
        return TASKS.get(channels, "text-to-image")

    @property
    def image_embedding_dim(self) -> int | None:
        """The width D of the image embeddings that condition an unCLIP checkpoint; None for other checkpoints.

        A checkpoint that gets its embeddings from a prior may come without an image encoder.
        """
        if self.image_encoder is not None:
            return self.image_encoder.projection_dim
        size = self.unet.class_embedding_size
        return None if size is None or self.unet.class_embedding != "projection" or self.direct else size // 2

    @property
    def tokenizer_dialect(self) -> TokenizerDialect:
        return "open_clip" if self.reference == Reference.ORIGINAL else "transformers"

    def to_json(self) -> dict[str, Any]:
        """The configuration in JSON types, with the format's version."""
        return {**_HEADER, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "CheckpointConfig":
        """The inverse of `to_json`.

        Raises:
            ValueError: The data has another format, a newer version, or unknown or missing keys.
        """
        return build(cls, _content(data), "config.json")


def unknown_channels(channels: int) -> str:
    """Why a UNet with so many input channels is refused, whose checkpoint does not say more."""
    if channels == 8:
        tasks = ", ".join(OF_TWO_LATENTS)
        return f"its UNet has 8 input channels and may be for {tasks}; open it with the pipeline for it"
    return f"UNets with {channels} input channels are not known; known: {', '.join(map(str, (*TASKS, 8)))}"


def for_task(config: CheckpointConfig, tasks: Collection[str]) -> CheckpointConfig:
    """A configuration that does not tell its task, as one for that of `tasks` which its networks fit; others as is."""
    fitting = [task for task in (ESTIMATES if config.direct else OF_TWO_LATENTS) if task in tasks]
    if config.trained_for is not None or not (config.reads_two_latents or config.direct) or not fitting:
        return config
    estimator = EstimatorConfig() if fitting[0] in ESTIMATES else None
    return dataclasses.replace(config, trained_for=fitting[0], estimator=config.estimator or estimator)


def predicting(config: CheckpointConfig, prediction: str) -> CheckpointConfig:
    """A configuration whose UNet makes this type of prediction.

    Args:
        config: The configuration to change.
        prediction: diffusers' name: "epsilon", "v_prediction" or "sample".

    Returns:
        A changed copy.

    Raises:
        ValueError: The name is unknown.
    """
    if prediction not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type is {prediction!r}; accepted: {', '.join(PREDICTION_TYPES)}")
    return dataclasses.replace(config, scheduler_config={**config.scheduler_config, "prediction_type": prediction})


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """A CLIP model on its own: both towers with their projections into one space, and the scale of its similarities.

    Args:
        text_encoder: The text tower.
        image_encoder: The image tower.
        tokenizer_dialect: Whose tokenizer it uses, see `unclip_jax.conditioning.tokenizer`.

    Raises:
        ValueError: The towers project into spaces of different widths.
    """

    text_encoder: TextConfig
    image_encoder: VisionConfig
    tokenizer_dialect: TokenizerDialect

    def __post_init__(self) -> None:
        if self.text_encoder.projection_dim != self.image_encoder.projection_dim:
            raise ValueError(
                f"ClipConfig: text_encoder.projection_dim is {self.text_encoder.projection_dim}, "
                f"image_encoder.projection_dim is {self.image_encoder.projection_dim}; want the same"
            )

    def to_json(self) -> dict[str, Any]:
        """The configuration in JSON types, with the format's version."""
        return {**_HEADER, "kind": "clip", **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ClipConfig":
        """The inverse of `to_json`.

        Raises:
            ValueError: As in `CheckpointConfig.from_json`.
        """
        return build(cls, {k: v for k, v in _content(data).items() if k != "kind"}, "config.json")


@dataclasses.dataclass(frozen=True)
class PriorCheckpointConfig:
    """A text-to-image-embedding prior on its own: its network, and the text tower that it reads.

    Args:
        prior: The prior's architecture.
        text_encoder: The text tower's.
        reference: The reference whose arithmetic it follows, as in `CheckpointConfig`; Karlo's own code is "original".
        scheduler_config: The diffusers settings of its scheduler, with `_class_name`.

    Raises:
        ValueError: The text tower's widths or length do not fit the prior's.
    """

    prior: PriorConfig
    text_encoder: TextConfig
    reference: Reference
    scheduler_config: Mapping[str, Any]

    def __post_init__(self) -> None:
        text, prior = self.text_encoder, self.prior
        if not text.width == text.projection_dim == prior.embedding_dim:
            raise ValueError(
                f"PriorCheckpointConfig: text_encoder has width {text.width} and projection_dim "
                f"{text.projection_dim}; the prior's embedding_dim is {prior.embedding_dim}; want the same"
            )
        if text.context_length != prior.context_length:
            raise ValueError(
                f"PriorCheckpointConfig: text_encoder.context_length is {text.context_length}, "
                f"prior.context_length is {prior.context_length}; want the same"
            )

    @property
    def tokenizer_dialect(self) -> TokenizerDialect:
        return "open_clip" if self.reference == Reference.ORIGINAL else "transformers"

    def to_json(self) -> dict[str, Any]:
        """The configuration in JSON types, with the format's version."""
        return {**_HEADER, "kind": "prior", **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "PriorCheckpointConfig":
        """The inverse of `to_json`.

        Raises:
            ValueError: As in `CheckpointConfig.from_json`.
        """
        return build(cls, {k: v for k, v in _content(data).items() if k != "kind"}, "config.json")


@dataclasses.dataclass(frozen=True)
class ControlNetCheckpointConfig:
    """A ControlNet on its own. It has no tokenizer: it reads the text states of the checkpoint that it controls.

    Args:
        controlnet: Its architecture.
    """

    controlnet: ControlNetConfig

    def to_json(self) -> dict[str, Any]:
        """The configuration in JSON types, with the format's version."""
        return {**_HEADER, "kind": "controlnet", **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ControlNetCheckpointConfig":
        """The inverse of `to_json`.

        Raises:
            ValueError: As in `CheckpointConfig.from_json`.
        """
        return build(cls, {k: v for k, v in _content(data).items() if k != "kind"}, "config.json")


@dataclasses.dataclass(frozen=True)
class TinyVAECheckpointConfig:
    """A tiny autoencoder on its own, which has no tokenizer.

    Args:
        vae: Its architecture.
    """

    vae: AutoencoderTinyConfig

    def to_json(self) -> dict[str, Any]:
        """The configuration in JSON types, with the format's version."""
        return {**_HEADER, "kind": "tiny-vae", **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "TinyVAECheckpointConfig":
        """The inverse of `to_json`.

        Raises:
            ValueError: As in `CheckpointConfig.from_json`.
        """
        return build(cls, {k: v for k, v in _content(data).items() if k != "kind"}, "config.json")


# Those of a network that has no tokenizer.
BareConfig = ControlNetCheckpointConfig | TinyVAECheckpointConfig
AnyConfig = CheckpointConfig | ClipConfig | PriorCheckpointConfig | BareConfig


def read_config(data: Mapping[str, Any]) -> AnyConfig:
    """The configuration in a config.json, of any kind.

    Raises:
        ValueError: As in the kinds' `from_json`.
    """
    match data.get("kind"):
        case "clip":
            return ClipConfig.from_json(data)
        case "prior":
            return PriorCheckpointConfig.from_json(data)
        case "controlnet":
            return ControlNetCheckpointConfig.from_json(data)
        case "tiny-vae":
            return TinyVAECheckpointConfig.from_json(data)
        case _:
            return CheckpointConfig.from_json(data)


_LARGEST = 1 << 20  # far above any size here; layers of more would take forever to describe
_HEADER = {"format": "unclip_jax", "format_version": FORMAT_VERSION}


def _content(data: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(data, Mapping) or data.get("format") != "unclip_jax":
        raise ValueError('config.json is not a converted unclip_jax checkpoint\'s (no "format": "unclip_jax")')
    if data.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"config.json has format_version {data.get('format_version')!r}; this version reads {FORMAT_VERSION}"
        )
    return {key: value for key, value in data.items() if key not in _HEADER}


def build(cls: Any, data: Any, where: str, largest: float = _LARGEST) -> Any:
    """Builds a dataclass from JSON types.

    Args:
        cls: The dataclass.
        data: The parsed JSON.
        where: What error messages call it.
        largest: The largest number that is accepted.

    Raises:
        ValueError: A key is unknown or missing, or a value has the wrong type. The message names it.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} is of type {type(data).__name__}; want an object")
    hints = typing.get_type_hints(cls)
    unknown = data.keys() - hints.keys()
    required = {
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    missing = required - data.keys()
    if unknown or missing:
        raise ValueError(f"{where}: unknown keys {sorted(unknown)}, missing keys {sorted(missing)}")
    return cls(**{name: _value(hints[name], value, f"{where}: {name}", largest) for name, value in data.items()})


def _value(hint: Any, value: Any, where: str, largest: float) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        first: ValueError | None = None
        # Of several dataclasses the one that has all of the keys, so that it says what is wrong with their values.
        for option in sorted((a for a in args if a is not type(None)), key=lambda a: not _has_keys(a, value)):
            try:
                return _value(option, value, where, largest)
            except ValueError as error:
                first = first or error
        raise first or ValueError(f"{where}: got {value!r}")
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where, largest)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_value(args[0], item, where, largest) for item in value)
    if origin is Literal and value in args:
        return value
    if hint is Reference and value in list(Reference):
        return Reference(value)
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return dict(value)
    if hint in (int, float) and isinstance(value, int | float) and not abs(value) <= largest:  # nor NaN
        raise ValueError(f"{where} is {str(value)[:40]}; want a number of at most {largest:g}")
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    expected = args if origin is Literal else tuple(Reference) if hint is Reference else getattr(hint, "__name__", hint)
    raise ValueError(f"{where} is {value!r}; want {expected}")


def _has_keys(hint: Any, value: Any) -> bool:
    """Whether a type is a dataclass with all keys of an object."""
    names = {field.name for field in dataclasses.fields(hint)} if dataclasses.is_dataclass(hint) else set()
    return isinstance(value, Mapping) and value.keys() <= names
