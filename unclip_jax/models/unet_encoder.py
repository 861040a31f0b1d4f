"""The UNet's encoder: embeddings of time and class, the way down, the middle. A ControlNet has one of its own."""

from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from unclip_jax.models.configs import UNetConfig
from unclip_jax.models.layers import Conv, Embed, ResnetBlock
from unclip_jax.models.timestep import timestep_embedding
from unclip_jax.models.unet_blocks import Block, TextKeyValues, TimestepMLP, Transformer


class UNetEncoder(nnx.Module):
    """What the UNet and a ControlNet share. What a sampling loop needs only once is a method of its own.

    Args:
        config: The UNet's architecture.
        dtype: The dtype of computation.
        param_dtype: The dtype of storage.
        remat: Recompute each resnet and transformer in the backward pass instead of keeping its activations.
        attention_chunk: The number of queries that attention takes at a time; None leaves that to the platform.
        rngs: The random keys for the parameters.
    """

    def __init__(
        self,
        config: UNetConfig,
        *,
        dtype: Any,
        param_dtype: Any,
        remat: bool,
        attention_chunk: int | None,
        rngs: nnx.Rngs,
    ):
        kw: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.dtype = dtype
        self.remat = remat
        self.time_features = config.block_out_channels[0]
        channels, last = config.block_out_channels, len(config.block_out_channels) - 1
        self.time_embedding = TimestepMLP(channels[0], config.time_channels, **kw)
        self.class_embedding = _class_embedding(config, **kw)
        self.conv_in = Conv(config.in_channels, channels[0], **kw)
        down, width = [], channels[0]
        for level, out in enumerate(channels):
            resnets = []
            for _ in range(config.layers_per_block):
                resnets.append(make_resnet(config, width, out, **kw))
                width = out
            # Symmetric padding, unlike the VAE's: the original's UNet pads all four sides by one.
            resample = Conv(width, width, stride=2, padding=((1, 1), (1, 1)), **kw) if level < last else None
            down.append(Block(resnets, make_transformers(config, level, len(resnets), attention_chunk, **kw), resample))
        self.down_blocks = nnx.List(down)

        # The middle always has self-attention, even if the level above it only reads the text.
        middle = Transformer(
            width, config.cross_attention_dim, config.num_heads[-1], config.norm_groups, False, attention_chunk, **kw
        )
        self.mid_block = Block([make_resnet(config, width, width, **kw) for _ in range(2)], [middle], None)

    def embed_time(self, timesteps: jax.Array) -> jax.Array:
        """timesteps: (B,) -> (B, time_channels)."""
        return self.time_embedding(timestep_embedding(timesteps, self.time_features).astype(self.dtype))

    def embed_class(self, class_labels: jax.Array) -> jax.Array:
        """Embeds class labels, to be added to the time embedding.

        Args:
            class_labels: (B, class_embedding_size) or (B,) int.

        Returns:
            (B, time_channels).

        Raises:
            ValueError: The network has no class conditioning.
        """
        if self.class_embedding is None:
            raise ValueError("class_labels is given; want None for a UNet without class conditioning")
        if isinstance(self.class_embedding, TimestepMLP):
            class_labels = class_labels.astype(self.dtype)
        return self.class_embedding(class_labels)

    def encode_context(self, context: jax.Array) -> TextKeyValues:
        """context: (B, S, cross_attention_dim) -> every transformer's keys and values of the text, in call order."""
        return [transformer.encode_context(context.astype(self.dtype)) for transformer in self._transformers()]

    def _blocks(self) -> Iterator[Block]:
        """In call order."""
        yield from self.down_blocks
        yield self.mid_block

    def _transformers(self) -> Iterator[Transformer]:
        for block in self._blocks():
            yield from block.attentions

    def _layer(
        self, block: Block, index: int, x: jax.Array, emb: jax.Array, texts: Iterator[tuple[Any, ...]]
    ) -> jax.Array:
        """A resnet, and the transformer after it, if there is one, which takes the next of `texts`."""
        run = nnx.remat(_apply) if self.remat else _apply
        x = run(block.resnets[index], x, emb)
        return run(block.attentions[index], x, *next(texts)) if index < len(block.attentions) else x

    def _encode(
        self, x: jax.Array, emb: jax.Array, texts: Iterator[tuple[Any, ...]]
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """From what `conv_in` gives: what each block gives, and the features for the way up, `x` first."""
        skips, outputs = [x], []
        for block in self.down_blocks:
            for index in range(len(block.resnets)):
                x = self._layer(block, index, x, emb, texts)
                skips.append(x)
            if block.resample is not None:
                x = block.resample(x)
                skips.append(x)
            outputs.append(x)
        for index in range(2):
            x = self._layer(self.mid_block, index, x, emb, texts)
        return [*outputs, x], skips


def make_resnet(config: UNetConfig, in_channels: int, out_channels: int, **kw: Any) -> ResnetBlock:
    """A residual block with the embedding of time. kw: dtype, param_dtype, rngs."""
    return ResnetBlock(
        in_channels, out_channels, groups=config.norm_groups, epsilon=1e-5, time_channels=config.time_channels, **kw
    )


def make_transformers(
    config: UNetConfig, level: int, count: int, attention_chunk: int | None, **kw: Any
) -> list[Transformer]:
    """The transformers of a level, which may have none. kw: dtype, param_dtype, rngs."""
    return [
        Transformer(
            config.block_out_channels[level],
            config.cross_attention_dim,
            config.num_heads[level],
            config.norm_groups,
            config.only_cross_attention[level],
            attention_chunk,
            **kw,
        )
        for _ in range(count if config.attention_levels[level] else 0)
    ]


def skip_channels(config: UNetConfig) -> list[int]:
    """The channels of the features that the way down leaves for the way up, in the order in which they are made."""
    skips = [config.block_out_channels[0]]
    for level, out in enumerate(config.block_out_channels):
        resampled = level < len(config.block_out_channels) - 1
        skips += [out] * (config.layers_per_block + resampled)
    return skips


def _class_embedding(config: UNetConfig, **kw: Any) -> TimestepMLP | Embed | None:
    if config.class_embedding_size is None:
        return None
    kind = TimestepMLP if config.class_embedding == "projection" else Embed
    return kind(config.class_embedding_size, config.time_channels, **kw)


def _apply(module: nnx.Module, x: jax.Array, *conditions: Any) -> jax.Array:
    return module(x, *conditions)
