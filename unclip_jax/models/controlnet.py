"""ControlNet: a second encoder that reads a hint, such as edges or depth, and adds to the UNet's features.

Zhang et al. 2023, arXiv:2302.05543. The encoder begins as a copy of the UNet's; what it says goes through convolutions
that begin as zeros, so that training begins with the UNet as it was.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from unclip_jax.models.configs import ControlNetConfig
from unclip_jax.models.layers import Conv
from unclip_jax.models.unet_blocks import TextKeyValues
from unclip_jax.models.unet_encoder import UNetEncoder, skip_channels


class HintEmbedding(nnx.Module):
    """The hint at the latents' size. Call: (B, H, W, conditioning_channels) in 0..1 -> (B, H/f, W/f, features)."""

    def __init__(self, config: ControlNetConfig, **kw: Any):
        widths = config.conditioning_embedding_out_channels
        self.conv_in = Conv(config.conditioning_channels, widths[0], **kw)
        blocks = []
        for width, wider in itertools.pairwise(widths):
            blocks += [
                Conv(width, width, **kw),
                Conv(width, wider, stride=2, padding=((1, 1), (1, 1)), **kw),
            ]
        self.blocks = nnx.List(blocks)
        self.conv_out = Conv(widths[-1], config.unet.block_out_channels[0], **kw)

    def __call__(self, hint: jax.Array) -> jax.Array:
        x = nnx.silu(self.conv_in(hint))
        for block in self.blocks:
            x = nnx.silu(block(x))
        return self.conv_out(x)


class ControlNetModel(UNetEncoder):
    """The network of a ControlNet. Call: latents, timesteps, text, hint and class labels -> the residuals.

    The call takes x (B, h, w, in_channels); timesteps (B,) in [0, 1000); context (B, S, cross_attention_dim); hint (B,
    H, W, conditioning_channels) in 0..1, with H and W `config.factor` times h and w; and class_labels as the UNet does.
    It returns what `UNet.denoise` takes as `residuals`, in the compute dtype: for each feature map that the way up
    reads, and for the middle's.

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
        config: ControlNetConfig,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        remat: bool = False,
        attention_chunk: int | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            config.unet,
            dtype=dtype,
            param_dtype=param_dtype,
            remat=remat,
            attention_chunk=attention_chunk,
            rngs=rngs,
        )
        kw: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.hint_embedding = HintEmbedding(config, **kw)
        self.zero_convs = nnx.List([Conv(width, width, 1, **kw) for width in skip_channels(config.unet)])
        width = config.unet.block_out_channels[-1]
        self.mid_zero_conv = Conv(width, width, 1, **kw)

    def embed_hint(self, hint: jax.Array) -> jax.Array:
        """hint: (B, H, W, conditioning_channels), red, green and blue in 0..1 -> (B, h, w, features)."""
        if self.config.controlnet_conditioning_channel_order == "bgr":
            hint = hint[..., ::-1]
        return self.hint_embedding(hint.astype(self.dtype))

    def residuals(self, x: jax.Array, emb: jax.Array, text: TextKeyValues, hint: jax.Array) -> list[jax.Array]:
        """The part that every step repeats.

        Args:
            x: (B, h, w, in_channels).
            emb: (B, time_channels), the sum of the time and class embeddings.
            text: From `encode_context`.
            hint: From `embed_hint`.

        Returns:
            One array for each feature map that the way up reads, then the middle's.
        """
        texts = iter([(key_values,) for key_values in text])
        (*_, middle), skips = self._encode(self.conv_in(x.astype(self.dtype)) + hint, emb, texts)
        made = [conv(skip) for conv, skip in zip(self.zero_convs, skips, strict=True)] + [self.mid_zero_conv(middle)]
        if self.config.global_pool_conditions:
            made = [residual.mean((1, 2), keepdims=True) for residual in made]
        return made

    def __call__(
        self,
        x: jax.Array,
        timesteps: jax.Array,
        context: jax.Array,
        hint: jax.Array,
        class_labels: jax.Array | None = None,
    ) -> list[jax.Array]:
        emb = self.embed_time(timesteps)
        if class_labels is not None:
            emb = emb + self.embed_class(class_labels)
        return self.residuals(x, emb, self.encode_context(context), self.embed_hint(hint))


def scaled(residuals: list[jax.Array], scale: jax.Array, graded: bool) -> list[jax.Array]:
    """Residuals times their scale.

    Args:
        residuals: From `ControlNetModel.residuals`: (B, h, w, C) each.
        scale: () or (B,), the conditioning scale.
        graded: From a tenth of the scale at full resolution to all of it in the middle, as in guess mode.

    Returns:
        The same shapes.
    """
    grades = jnp.logspace(-1, 0, len(residuals)) if graded else jnp.ones(len(residuals))
    factors = (grade * jnp.reshape(scale, (-1, 1, 1, 1)) for grade in grades)
    return [residual * by.astype(residual.dtype) for residual, by in zip(residuals, factors, strict=True)]
