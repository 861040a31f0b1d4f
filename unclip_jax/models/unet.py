"""The denoising UNet of the Stable Diffusion 2 family (Rombach et al. 2022, arXiv:2112.10752).

Four levels of residual blocks and text-conditioned transformers, each level half the size of the one above. One class
serves every published checkpoint: 4, 5, 7 or 9 input channels; class conditioning by a projected vector (unCLIP), by a
table (the x4 upscaler) or none; and transformers whose first attention also reads the text (the upscaler).

What a sampling loop needs only once is its own method: `embed_time`, `embed_class`, `encode_context`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from unclip_jax.models.configs import UNetConfig
from unclip_jax.models.freeu import FreeU, reweight
from unclip_jax.models.layers import Conv, GroupNorm
from unclip_jax.models.unet_blocks import Block, TextKeyValues
from unclip_jax.models.unet_encoder import UNetEncoder, make_resnet, make_transformers, skip_channels
from unclip_jax.models.upsampling import upsample_and_convolve


class UNet(UNetEncoder):
    """The denoiser. Call: latents, timesteps, text and class conditioning -> the model's prediction.

    The call takes x (B, H, W, in_channels) of any size, though those it was trained with are multiples of
    `config.size_multiple`; timesteps (B,) in [0, 1000), fractions allowed; context (B, S, cross_attention_dim), the
    text encoder's hidden states; and class_labels: (B, class_embedding_size) float for "projection", (B,) int for
    "table", or None; and what a ControlNet adds, see `denoise`. It returns (B, H, W, out_channels) in the compute
    dtype: epsilon, v or x0, as the checkpoint was trained.

    Args:
        config: The architecture.
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
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        remat: bool = False,
        attention_chunk: int | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            config,
            dtype=dtype,
            param_dtype=param_dtype,
            remat=remat,
            attention_chunk=attention_chunk,
            rngs=rngs,
        )
        kw: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        channels, skips = config.block_out_channels, skip_channels(config)
        width = channels[-1]
        up = []
        for level, out in reversed(list(enumerate(channels))):
            resnets = []
            for _ in range(config.layers_per_block + 1):
                resnets.append(make_resnet(config, width + skips.pop(), out, **kw))
                width = out
            resample = Conv(width, width, **kw) if level > 0 else None
            up.append(Block(resnets, make_transformers(config, level, len(resnets), attention_chunk, **kw), resample))
        self.up_blocks = nnx.List(up)

        self.conv_norm_out = GroupNorm(width, config.norm_groups, epsilon=1e-5, param_dtype=param_dtype)
        self.conv_out = Conv(width, config.out_channels, **kw)

    def perturb_attention(self, rows: jax.Array, layers: Sequence[str] = ("mid",)) -> list[jax.Array | None]:
        """Makes the argument `perturbed` of `denoise`.

        Args:
            rows: (B,) bool, which rows of the batch are perturbed.
            layers: Whose self-attention is perturbed: "mid", or layers on the way "down" or "up", with blocks numbered
                in call order. "down.1" is all of a block's transformers, "down.1.0" its first.

        Returns:
            One entry per transformer, in call order.

        Raises:
            ValueError: A layer has no self-attention.
        """
        names: list[str | None] = []
        for way, blocks in (("down", self.down_blocks), ("mid", [self.mid_block]), ("up", self.up_blocks)):
            for number, block in enumerate(blocks):
                start = way if way == "mid" else f"{way}.{number}"
                names += [None if t.only_cross_attention else f"{start}.{n}" for n, t in enumerate(block.attentions)]
        chosen = {layer: [f"{name}.".startswith(f"{layer}.") for name in names] for layer in layers}
        for layer, where in chosen.items():
            if not any(where):
                accepted = ", ".join(name for name in names if name is not None)
                raise ValueError(f"perturbed layer {layer!r} has no self-attention; accepted: {accepted}")
        return [rows if any(column) else None for column in zip(*chosen.values(), strict=True)]

    def denoise(
        self,
        x: jax.Array,
        emb: jax.Array,
        text: TextKeyValues,
        perturbed: Sequence[jax.Array | None] | None = None,
        freeu: FreeU | None = None,
        residuals: Sequence[jax.Array] | None = None,
    ) -> jax.Array:
        """The part that every step repeats.

        Args:
            x: (B, H, W, in_channels).
            emb: (B, time_channels), the sum of the time and class embeddings.
            text: From `encode_context`.
            perturbed: From `perturb_attention`: which rows lose their self-attention in which layers.
            freeu: Reweights the up path; None leaves it as trained.
            residuals: From `ControlNetModel.residuals`, in any float dtype, to be added to the features that the way
                up reads and to the middle's.

        Returns:
            (B, H, W, out_channels), the prediction.
        """
        return self.denoise_deeply(x, emb, text, perturbed, freeu, residuals)[0]

    def denoise_deeply(
        self,
        x: jax.Array,
        emb: jax.Array,
        text: TextKeyValues,
        perturbed: Sequence[jax.Array | None] | None = None,
        freeu: FreeU | None = None,
        residuals: Sequence[jax.Array] | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """As `denoise`, and what `denoise_shallowly` needs to make the next prediction from it.

        Returns:
            The prediction; and (B, H, W, block_out_channels[0]), what the last layer of the way up reads from below.
        """
        outputs, deep = self._blocks_of(x, emb, text, perturbed, freeu, residuals)
        return self._predict(outputs[-1]), deep

    def denoise_shallowly(
        self, x: jax.Array, emb: jax.Array, text: TextKeyValues, deep: jax.Array, freeu: FreeU | None = None
    ) -> jax.Array:
        """A prediction by the first and the last layer alone, with what an earlier evaluation found below them.

        Features deep in the network change little from step to step. Source: DeepCache, Ma et al. 2023,
        arXiv:2312.00858, with its first branch.

        Args:
            x: As of `denoise`, like the others.
            emb: Of this step.
            text: From `encode_context`.
            deep: From `denoise_deeply` of an earlier step.
            freeu: As of that step.

        Returns:
            (B, H, W, out_channels).
        """
        block, level = self.up_blocks[-1], len(self.up_blocks) - 1
        skip = self.conv_in(x.astype(self.dtype))
        if freeu is not None:
            deep, skip = reweight(deep, skip, level, freeu)
        own = iter([(text[-1], None)])
        x = self._layer(block, len(block.resnets) - 1, jnp.concatenate([deep, skip], axis=-1), emb, own)
        return self._predict(x)

    def _predict(self, x: jax.Array) -> jax.Array:
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))

    def features(
        self,
        x: jax.Array,
        timesteps: jax.Array,
        context: jax.Array,
        class_labels: jax.Array | None = None,
        *,
        layers: Sequence[str],
    ) -> dict[str, jax.Array]:
        """What blocks give on the way to the prediction: features of an image at a noise level.

        Under `jit` nothing is computed that the layers do not need. Source: DIFT, Tang et al. 2023, arXiv:2306.03881.

        Args:
            x: As of the call: noised latents, and what the UNet reads beside them.
            timesteps: (B,), the noise level of x.
            context: As of the call.
            class_labels: As of the call.
            layers: Of `layer_names`: "down.0" to "down.3", "mid", "up.0" to "up.3" in Stable Diffusion 2. A block gives
                what the next one reads: halved, or doubled, where it resamples.

        Returns:
            By layer, (B, h, w, channels) in the compute dtype.

        Raises:
            ValueError: A layer is none of these, or as of the call.
        """
        names = self.layer_names
        if unknown := [layer for layer in layers if layer not in names]:
            raise ValueError(f"layers has {unknown[0]!r}; accepted: {', '.join(names)}")
        emb, text = self._embed(x, timesteps, context, class_labels)
        outputs, _ = self._blocks_of(x, emb, text, None, None, None)
        given = dict(zip(names, outputs, strict=True))
        return {layer: given[layer] for layer in layers}

    @property
    def layer_names(self) -> list[str]:
        """The blocks in call order, as `features` and `perturb_attention` call them."""
        levels = range(len(self.down_blocks))
        return [*(f"down.{n}" for n in levels), "mid", *(f"up.{n}" for n in levels)]

    def _blocks_of(
        self,
        x: jax.Array,
        emb: jax.Array,
        text: TextKeyValues,
        perturbed: Sequence[jax.Array | None] | None,
        freeu: FreeU | None,
        residuals: Sequence[jax.Array] | None,
    ) -> tuple[list[jax.Array], jax.Array]:
        """What each block gives, in the order of `layer_names`; and what the last layer reads from below."""
        texts = iter(zip(text, perturbed or [None] * len(text), strict=True))
        outputs, skips = self._encode(self.conv_in(x.astype(self.dtype)), emb, texts)
        x = outputs[-1]
        if residuals is not None:
            *of_skips, of_middle = residuals
            x = x + of_middle.astype(x.dtype)
            skips = [skip + residual.astype(x.dtype) for skip, residual in zip(skips, of_skips, strict=True)]
        for level, block in enumerate(self.up_blocks):
            for index in range(len(block.resnets)):
                deep, skip = x, skips.pop()
                if freeu is not None:
                    x, skip = reweight(x, skip, level, freeu)
                x = self._layer(block, index, jnp.concatenate([x, skip], axis=-1), emb, texts)
            if block.resample is not None:
                # As large as the level above, which may have odd sides.
                _, height, width, _ = skips[-1].shape
                x = upsample_and_convolve(block.resample, x, (height, width))
            outputs.append(x)
        return outputs, deep

    def __call__(
        self,
        x: jax.Array,
        timesteps: jax.Array,
        context: jax.Array,
        class_labels: jax.Array | None = None,
        residuals: Sequence[jax.Array] | None = None,
    ) -> jax.Array:
        emb, text = self._embed(x, timesteps, context, class_labels)
        return self.denoise(x, emb, text, residuals=residuals)

    def _embed(
        self, x: jax.Array, timesteps: jax.Array, context: jax.Array, class_labels: jax.Array | None
    ) -> tuple[jax.Array, TextKeyValues]:
        """The embedding of time and class, and the text's keys and values, of a call whose inputs fit."""
        if x.ndim != 4 or x.shape[3] != self.config.in_channels:
            raise ValueError(f"x has shape {x.shape}; want (B, H, W, {self.config.in_channels})")
        if (class_labels is None) != (self.class_embedding is None):
            raise ValueError(f"class_labels is {'None; want labels' if class_labels is None else 'given; want None'}")
        emb = self.embed_time(timesteps)
        if class_labels is not None:
            emb = emb + self.embed_class(class_labels)
        return emb, self.encode_context(context)

    def _blocks(self) -> Iterator[Block]:
        yield from super()._blocks()
        yield from self.up_blocks
