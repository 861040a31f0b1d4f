"""The architectures of the networks, as plain values.

A checkpoint is opened, and executables are run, without Flax: its modules are imported where a network is traced.
"""

import dataclasses
import math
from typing import Literal, get_args

Activation = Literal["gelu", "quick_gelu"]

# A broken file must not fill the memory, nor take hours: of towers, which stack their layers, and of other networks.
MAX_STACKED_LAYERS = 1024
MAX_LEVELS, MAX_LAYERS = 8, 16
# Pixels a token of the depth estimator's transformer, along each side: the stem's and the stages' strides.
PATCH = 16


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The architecture of a UNet; the defaults are Stable Diffusion 2.1's.

    The per-level tuples run from full resolution down.

    Args:
        in_channels: The latents' channels, and those of a depth map, a small image, or a mask with masked latents.
        out_channels: The latents' channels.
        block_out_channels: Channels per level.
        layers_per_block: ResNet blocks per level on the way down; one more on the way up.
        attention_levels: Whether a level has transformer blocks.
        num_heads: Attention heads per level; the last also serves the middle block.
        cross_attention_dim: The width of the text states.
        only_cross_attention: Whether a level's first attention reads the text, too.
        class_embedding: "projection" (a vector of `class_embedding_size` features through an MLP), "table" (an integer,
            looked up among `class_embedding_size` rows) or None.
        class_embedding_size: See `class_embedding`.
        norm_groups: Groups of the group norms.
        sample_size: The latents' default height and width.

    Raises:
        ValueError: A number is out of range, or the tuples have different lengths.
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    num_heads: tuple[int, ...] = (5, 10, 20, 20)
    cross_attention_dim: int = 1024
    only_cross_attention: tuple[bool, ...] = (False, False, False, False)
    class_embedding: Literal["projection", "table"] | None = None
    class_embedding_size: int | None = None
    norm_groups: int = 32
    sample_size: int = 96

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        if not levels or min(self.block_out_channels) < 1 or self.norm_groups < 1 or self.layers_per_block < 1:
            raise ValueError(
                f"UNetConfig: block_out_channels {self.block_out_channels}, norm_groups {self.norm_groups} and "
                f"layers_per_block {self.layers_per_block}: want at least one level, and positive numbers"
            )
        if levels > MAX_LEVELS or self.layers_per_block > MAX_LAYERS:
            raise ValueError(
                f"UNetConfig: {levels} levels of {self.layers_per_block} layers; want at most {MAX_LEVELS} "
                f"of {MAX_LAYERS}"
            )
        for name in ("attention_levels", "num_heads", "only_cross_attention"):
            if len(getattr(self, name)) != levels:
                raise ValueError(
                    f"UNetConfig.{name} has {len(getattr(self, name))} entries; want one per level, {levels}"
                )
        for level, (channels, heads) in enumerate(zip(self.block_out_channels, self.num_heads, strict=True)):
            attends = self.attention_levels[level] or level == levels - 1
            if heads < 1 or (attends and channels % heads) or channels % self.norm_groups:
                raise ValueError(
                    f"UNetConfig.block_out_channels: {channels} is not divisible by num_heads={heads} "
                    f"and norm_groups={self.norm_groups}"
                )
        if self.class_embedding not in (None, "projection", "table"):
            raise ValueError(f"UNetConfig.class_embedding is {self.class_embedding!r}; want projection, table or None")
        if (self.class_embedding is None) != (self.class_embedding_size is None):
            raise ValueError("UNetConfig.class_embedding and class_embedding_size: one is set; want both or neither")

    @property
    def time_channels(self) -> int:
        return 4 * self.block_out_channels[0]

    @property
    def head_width(self) -> int:
        """A multiple of the width of every level's attention heads."""
        attending = [*self.attention_levels[:-1], True]
        levels = zip(self.block_out_channels, self.num_heads, attending, strict=True)
        return math.lcm(*(channels // heads for channels, heads, attends in levels if attends))

    @property
    def size_multiple(self) -> int:
        """The latents' height and width must be multiples of this: each level below the first halves them."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclasses.dataclass(frozen=True)
class ControlNetConfig:
    """The architecture of a ControlNet; the defaults fit Stable Diffusion 2.1.

    Args:
        unet: The UNet whose encoder it copies. Its `in_channels` are the latents' alone, and what it is beside its
            encoder does not matter.
        conditioning_channels: The hint's channels.
        conditioning_embedding_out_channels: Widths of the convolutions that bring the hint to the latents' size. There
            is a halving between two neighbours.
        controlnet_conditioning_channel_order: The order of colours in which the network reads hints. They are given in
            red, green, blue.
        global_pool_conditions: Whether each residual is averaged over the image ("shuffle" ControlNets).

    Raises:
        ValueError: A number is out of range.
    """

    unet: UNetConfig = UNetConfig()
    conditioning_channels: int = 3
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    controlnet_conditioning_channel_order: Literal["rgb", "bgr"] = "rgb"
    global_pool_conditions: bool = False

    def __post_init__(self) -> None:
        widths = self.conditioning_embedding_out_channels
        if not 1 <= len(widths) <= MAX_LEVELS or min(widths) < 1 or self.conditioning_channels < 1:
            raise ValueError(
                f"ControlNetConfig: conditioning_channels {self.conditioning_channels} and "
                f"conditioning_embedding_out_channels {widths}: want 1 to {MAX_LEVELS} widths, and positive numbers"
            )

    @property
    def factor(self) -> int:
        """The side of a latent cell in the hint's pixels."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)

    @property
    def head_width(self) -> int:
        """A multiple of the width of every level's attention heads."""
        return self.unet.head_width


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The architecture of an autoencoder; the defaults are Stable Diffusion 2's.

    Args:
        in_channels: An image's channels.
        latent_channels: The latents' channels.
        block_out_channels: Channels per level, from full resolution down.
        layers_per_block: ResNet blocks per level of the encoder; one more in the decoder.
        norm_groups: Groups of the group norms.
        scaling_factor: The UNet's latents are so many times the autoencoder's own.

    Raises:
        ValueError: A number is out of range.
    """

    in_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_groups: int = 32
    scaling_factor: float = 0.18215

    def __post_init__(self) -> None:
        if len(self.block_out_channels) > MAX_LEVELS or not 1 <= self.layers_per_block <= MAX_LAYERS:
            raise ValueError(
                f"VAEConfig: {len(self.block_out_channels)} levels of {self.layers_per_block} layers; "
                f"want at most {MAX_LEVELS} of 1 to {MAX_LAYERS}"
            )
        if self.norm_groups < 1:
            raise ValueError(f"VAEConfig.norm_groups is {self.norm_groups}; want at least 1")
        if not self.block_out_channels or any(c < 1 or c % self.norm_groups for c in self.block_out_channels):
            raise ValueError(
                f"VAEConfig.block_out_channels {self.block_out_channels}: want positive multiples of norm_groups, "
                f"{self.norm_groups}"
            )
        if not 0 < self.scaling_factor < math.inf:
            raise ValueError(f"VAEConfig.scaling_factor is {self.scaling_factor}; want a positive number")

    @property
    def factor(self) -> int:
        """The side of a latent cell in pixels."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def head_width(self) -> int:
        """Of the one head of attention."""
        return self.block_out_channels[-1]


@dataclasses.dataclass(frozen=True)
class AutoencoderTinyConfig:
    """The architecture of a tiny autoencoder, under diffusers' names; the defaults are those of TAESD.

    The per-level tuples of the encoder run from full resolution down, the decoder's from the latents up.

    Args:
        in_channels: An image's channels.
        latent_channels: The latents' channels.
        encoder_block_out_channels: Channels per level: the same in all of them, as nothing between levels changes them.
        decoder_block_out_channels: Likewise.
        num_encoder_blocks: Blocks per level.
        num_decoder_blocks: Likewise.
        scaling_factor: The UNet's latents are so many times the autoencoder's own.
        latent_magnitude: Of a way to keep latents as 8-bit pictures, which nothing here reads.
        latent_shift: Likewise.

    Raises:
        ValueError: A number is out of range, or the tuples have different lengths.
    """

    in_channels: int = 3
    latent_channels: int = 4
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    scaling_factor: float = 1.0
    latent_magnitude: float = 3.0
    latent_shift: float = 0.5

    def __post_init__(self) -> None:
        levels = len(self.encoder_block_out_channels)
        for name in ("encoder_block_out_channels", "decoder_block_out_channels"):
            widths = getattr(self, name)
            if not 1 <= len(widths) <= MAX_LEVELS or len(widths) != levels or len(set(widths)) > 1 or widths[0] < 1:
                raise ValueError(
                    f"AutoencoderTinyConfig.{name} is {widths}; want one width for each of 1 to {MAX_LEVELS} levels, "
                    "the same in all, and as many levels in the encoder as in the decoder"
                )
        for name in ("num_encoder_blocks", "num_decoder_blocks"):
            counts = getattr(self, name)
            if len(counts) != levels or not all(0 <= count <= MAX_LAYERS for count in counts):
                raise ValueError(
                    f"AutoencoderTinyConfig.{name} is {counts}; want 0 to {MAX_LAYERS} for each of {levels} levels"
                )
        if min(self.in_channels, self.latent_channels) < 1:
            raise ValueError(
                f"AutoencoderTinyConfig: in_channels {self.in_channels} and latent_channels {self.latent_channels}: "
                "want positive numbers"
            )
        if not 0 < self.scaling_factor < math.inf:
            raise ValueError(f"AutoencoderTinyConfig.scaling_factor is {self.scaling_factor}; want a positive number")

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        """Channels per level, as `VAEConfig` has them."""
        return self.decoder_block_out_channels

    @property
    def factor(self) -> int:
        """The side of a latent cell in pixels."""
        return 2 ** (len(self.num_decoder_blocks) - 1)


# What the VAE of a checkpoint may be.
AnyVAEConfig = VAEConfig | AutoencoderTinyConfig


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The architecture of a text tower; the defaults are the part of OpenCLIP ViT-H/14 that Stable Diffusion 2 runs.

    That is 23 of its 24 layers, followed by the final norm: "the penultimate layer".

    Args:
        vocab_size: The number of token ids.
        context_length: The number of positions.
        width: The width of the hidden states.
        layers: The number of layers.
        heads: The number of attention heads, which divides `width`.
        mlp_width: The width of the MLP's hidden layer.
        activation: "gelu" or "quick_gelu".
        projection_dim: The width of the joint space, for towers used with their projection; None for towers that only
            give hidden states.

    Raises:
        ValueError: A number is out of range.
    """

    vocab_size: int = 49408
    context_length: int = 77
    width: int = 1024
    layers: int = 23
    heads: int = 16
    mlp_width: int = 4096
    activation: Activation = "gelu"
    projection_dim: int | None = None

    def __post_init__(self) -> None:
        _check_layers(self)

    @property
    def head_width(self) -> int:
        return self.width // self.heads


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The architecture of a vision tower; the defaults are OpenCLIP ViT-H/14's.

    Args:
        image_size: S, the side of the image in pixels.
        patch_size: The side of a patch, at most `image_size`.
        width: As in `TextConfig`.
        layers: As in `TextConfig`.
        heads: As in `TextConfig`.
        mlp_width: As in `TextConfig`.
        activation: As in `TextConfig`.
        projection_dim: The width of the joint space.

    Raises:
        ValueError: A number is out of range.
    """

    image_size: int = 224
    patch_size: int = 14
    width: int = 1280
    layers: int = 32
    heads: int = 16
    mlp_width: int = 5120
    activation: Activation = "gelu"
    projection_dim: int = 1024

    def __post_init__(self) -> None:
        _check_layers(self)
        if not 0 < self.patch_size <= self.image_size:
            raise ValueError(f"VisionConfig.patch_size is {self.patch_size}; want 1 to image_size, {self.image_size}")

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def tokens(self) -> int:
        """The number of patches, plus one for the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


def _check_layers(config: TextConfig | VisionConfig) -> None:
    name = type(config).__name__
    if not 1 <= config.layers <= MAX_STACKED_LAYERS:
        raise ValueError(f"{name}.layers is {config.layers}; want 1 to {MAX_STACKED_LAYERS}")
    if config.heads < 1 or config.width % config.heads:
        raise ValueError(f"{name}.width is {config.width}; want a multiple of heads, {config.heads}")
    if config.activation not in get_args(Activation):
        raise ValueError(f"{name}.activation is {config.activation!r}; accepted: {', '.join(get_args(Activation))}")


@dataclasses.dataclass(frozen=True)
class DepthConfig:
    """The architecture of a depth estimator; the defaults are those of MiDaS' `dpt_hybrid`.

    Args:
        image_size: The side of the training images; other sizes work, too, with resized positions.
        stem_width: Channels of the ResNet's first convolution.
        stage_widths: Channels of the ResNet's three stages.
        stage_depths: Bottleneck blocks of each stage.
        norm_groups: Groups of the ResNet's group norms.
        width: The transformer's width.
        layers: The transformer's layers.
        heads: The transformer's attention heads.
        mlp_width: The width of the transformer's MLPs.
        activation: The MLPs' activation.
        norm_epsilon: Of the transformer's norms: 1e-6 in MiDaS and 1e-12 in transformers.
        taps: The transformer layers, counted from 0, whose output the neck reads.
        reassemble_widths: The neck's channels for each of them.
        fusion_width: Channels of the fusion blocks.

    Raises:
        ValueError: A number is out of range.
    """

    image_size: int = 384
    stem_width: int = 64
    stage_widths: tuple[int, ...] = (256, 512, 1024)
    stage_depths: tuple[int, ...] = (3, 4, 9)
    norm_groups: int = 32
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: Activation = "gelu"
    norm_epsilon: float = 1e-6
    taps: tuple[int, ...] = (8, 11)
    reassemble_widths: tuple[int, ...] = (768, 768)
    fusion_width: int = 256

    def __post_init__(self) -> None:
        if len(self.stage_widths) != 3 or len(self.stage_depths) != 3 or min(self.stage_depths) < 1:
            raise ValueError(
                f"DepthConfig: stage_widths {self.stage_widths} and stage_depths {self.stage_depths}: want three stages"
            )
        channels = (self.stem_width, *(c // 4 for c in self.stage_widths), *self.stage_widths)
        if any(c % 4 for c in self.stage_widths) or any(c < 1 or c % self.norm_groups for c in channels):
            raise ValueError(
                f"DepthConfig: stem_width {self.stem_width} and a quarter of each of stage_widths {self.stage_widths} "
                f"must be multiples of norm_groups, {self.norm_groups}"
            )
        if len(self.taps) != 2 or len(self.reassemble_widths) != 2 or not 0 <= self.taps[0] < self.taps[1]:
            raise ValueError(
                f"DepthConfig: taps {self.taps} and reassemble_widths {self.reassemble_widths}: want two, rising"
            )
        if self.taps[1] != self.layers - 1:
            raise ValueError(f"DepthConfig.taps {self.taps}: the second is the last of {self.layers} layers")
        if self.image_size < PATCH or self.image_size % PATCH:
            raise ValueError(f"DepthConfig.image_size is {self.image_size}; want a multiple of {PATCH}")
        if max(self.layers, *self.stage_depths) > MAX_STACKED_LAYERS:
            raise ValueError(
                f"DepthConfig: layers {self.layers} and stage_depths {self.stage_depths}: want at most "
                f"{MAX_STACKED_LAYERS}"
            )
        if self.width % self.heads:
            raise ValueError(f"DepthConfig.width is {self.width}; want a multiple of heads, {self.heads}")


@dataclasses.dataclass(frozen=True)
class PriorConfig:
    """The architecture of a prior; the defaults are Karlo's `prior_1B_vit_l`.

    Args:
        embedding_dim: D, the width of CLIP's joint space and of its text tower's states.
        context_length: S, the number of tokens of a text.
        width: The width of the hidden states.
        layers: The number of layers.
        heads: The number of attention heads.

    Raises:
        ValueError: A number is out of range.
    """

    embedding_dim: int = 768
    context_length: int = 77
    width: int = 2048
    layers: int = 20
    heads: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.layers <= MAX_STACKED_LAYERS:
            raise ValueError(f"PriorConfig.layers is {self.layers}; want 1 to {MAX_STACKED_LAYERS}")
        if self.heads < 1 or self.width < 1 or self.width % self.heads:
            raise ValueError(f"PriorConfig.width is {self.width}; want a multiple of heads, {self.heads}")
        for name in ("embedding_dim", "context_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"PriorConfig.{name} is {getattr(self, name)}; want at least 1")

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def mlp_width(self) -> int:
        return 4 * self.width

    @property
    def activation(self) -> Activation:
        return "gelu"
