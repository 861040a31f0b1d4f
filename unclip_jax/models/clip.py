"""The CLIP towers, which embed text and images (Radford et al. 2021, arXiv:2103.00020).

OpenCLIP's ViT-H/14 (exact GELU) and OpenAI's ViT-L/14 (QuickGELU) are the same two classes with different numbers. Each
tower's layers are stacked along a leading axis and scanned, so that 32 layers compile as one.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from unclip_jax.models.attention import attend
from unclip_jax.models.configs import Activation, TextConfig, VisionConfig
from unclip_jax.models.layers import Embed, Linear, gelu, layer_norm, or_zeros


class LayerConfig(Protocol):
    """What a stack of layers is built from."""

    @property
    def width(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def mlp_width(self) -> int: ...
    @property
    def activation(self) -> Activation: ...


def activate(kind: Activation, x: jax.Array) -> jax.Array:
    """The MLP's non-linearity: the exact GELU, or OpenAI's sigmoid approximation of it."""
    return x * jax.nn.sigmoid(1.702 * x) if kind == "quick_gelu" else gelu(x)


class Layer(nnx.Module):
    """Pre-norm attention and MLP. Call: x (B, T, width), bias as in `attend` -> (B, T, width)."""

    def __init__(self, config: LayerConfig, *, epsilon: float = 1e-5, **kw: Any):
        width = config.width
        self.heads = config.heads
        self.activation = config.activation
        self.norm1 = layer_norm(width, epsilon=epsilon, **kw)
        self.q_proj = Linear(width, width, **kw)
        self.k_proj = Linear(width, width, **kw)
        self.v_proj = Linear(width, width, **kw)
        self.out_proj = Linear(width, width, **kw)
        self.norm2 = layer_norm(width, epsilon=epsilon, **kw)
        self.fc1 = Linear(width, config.mlp_width, **kw)
        self.fc2 = Linear(config.mlp_width, width, **kw)

    def __call__(self, x: jax.Array, bias: jax.Array | None) -> jax.Array:
        h = self.norm1(x)
        q, k, v = (p(h).reshape(*h.shape[:2], self.heads, -1) for p in (self.q_proj, self.k_proj, self.v_proj))
        x = x + self.out_proj(attend(q, k, v, bias).reshape(x.shape))
        return x + self.fc2(activate(self.activation, self.fc1(self.norm2(x))))


def stack_layers(config: LayerConfig, rngs: nnx.Rngs, **kw: Any) -> Layer:
    """All layers of a tower as one module, whose parameters have a leading axis, (layers, ...).

    Of `rngs` that give no keys, see `or_zeros`, there is nothing to split.
    """

    @nnx.split_rngs(splits=config.layers)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def build(rngs: nnx.Rngs) -> Layer:
        return Layer(config, rngs=rngs, **kw)

    @nnx.vmap(in_axes=(), out_axes=0, axis_size=config.layers)
    def shapes() -> Layer:
        return Layer(config, rngs=rngs, **kw)

    return build(rngs) if isinstance(rngs, nnx.Rngs) else shapes()


def run_layers(
    layers: Layer,
    x: jax.Array,
    bias: jax.Array | None,
    *,
    remat: bool = False,
    start: int | None = None,
    stop: int | None = None,
) -> jax.Array:
    """Runs the stacked layers start..stop, one after the other.

    Args:
        layers: The stacked layers.
        x: (B, T, width).
        bias: As in `attend`.
        remat: Recompute each layer in the backward pass instead of keeping its activations.
        start: The first layer; None for 0.
        stop: The end, exclusive; None for all.

    Returns:
        (B, T, width).
    """
    graphdef, state = nnx.split(layers)
    if (start, stop) != (None, None):
        state = jax.tree.map(lambda stacked: stacked[start:stop], state)

    def body(x: jax.Array, params: Any) -> tuple[jax.Array, None]:
        return nnx.merge(graphdef, params)(x, bias), None

    return jax.lax.scan(jax.checkpoint(body) if remat else body, x, state)[0]


class TextEncoder(nnx.Module):
    """The text tower. Call: tokens (B, T) int32 -> hidden states (B, T, width) after the final norm.

    Attention is causal and padding is not masked, as in training.

    Args:
        config: The architecture.
        dtype: Of computation.
        param_dtype: Of the parameters.
        remat: Whether activations are recomputed in the backward pass.
    """

    def __init__(
        self,
        config: TextConfig,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        kw: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.config = config
        self.remat = remat
        self.token_embedding = Embed(config.vocab_size, config.width, rngs=rngs, **kw)
        self.position_embedding = Embed(config.context_length, config.width, rngs=rngs, **kw)
        self.layers = stack_layers(config, rngs, **kw)
        self.final_norm = layer_norm(config.width, rngs=rngs, **kw)
        self.projection = (
            None
            if config.projection_dim is None
            else Linear(config.width, config.projection_dim, use_bias=False, rngs=rngs, **kw)
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        length = tokens.shape[1]
        if length > self.config.context_length:
            raise ValueError(f"tokens has {length} columns; this tower takes at most {self.config.context_length}")
        x = self.token_embedding(tokens) + self.position_embedding(jnp.arange(length))
        future = np.triu(np.full((length, length), -np.inf, np.float32), 1)
        return self.final_norm(run_layers(self.layers, x, jnp.asarray(future), remat=self.remat))

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Embeds texts: the projected state of each text's end token, un-normalised.

        The end token has the highest id of the vocabulary, so its first position is the arg-max.

        Args:
            tokens: (B, T) int32.

        Returns:
            (B, projection_dim).

        Raises:
            ValueError: The tower was loaded without its projection.
        """
        return self.describe(tokens)[1]

    def describe(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The results of the call and of `embed` from one pass: (B, T, width) and (B, projection_dim).

        Raises:
            ValueError: The tower was loaded without its projection.
        """
        if self.projection is None:
            raise ValueError("this text tower has no projection into the joint space (projection_dim is None)")
        hidden = self(tokens)
        return hidden, self.projection(hidden[jnp.arange(tokens.shape[0]), jnp.argmax(tokens, axis=-1)])


class VisionEncoder(nnx.Module):
    """The vision tower. Call: pixel values (B, S, S, 3) -> image embeddings (B, projection_dim), un-normalised.

    Pixel values are CLIP-normalised (`unclip_jax.conditioning.clip_image.preprocess`), S = `config.image_size`.

    Args:
        config: The architecture.
        dtype: Of computation.
        param_dtype: Of the parameters.
        remat: Whether activations are recomputed in the backward pass.
    """

    def __init__(
        self,
        config: VisionConfig,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        kw: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.config = config
        self.remat = remat
        self.dtype = dtype
        patch = 3 * config.patch_size**2
        self.patch_embedding = Linear(patch, config.width, use_bias=False, rngs=rngs, **kw)
        self.class_embedding = nnx.Param(
            or_zeros(nnx.initializers.normal(config.width**-0.5))(rngs.params(), (config.width,), param_dtype)
        )
        self.position_embedding = Embed(config.tokens, config.width, rngs=rngs, **kw)
        self.pre_norm = layer_norm(config.width, rngs=rngs, **kw)
        self.layers = stack_layers(config, rngs, **kw)
        self.post_norm = layer_norm(config.width, rngs=rngs, **kw)
        self.projection = Linear(config.width, config.projection_dim, use_bias=False, rngs=rngs, **kw)

    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        size, p = self.config.image_size, self.config.patch_size
        if pixel_values.shape[1:] != (size, size, 3):
            raise ValueError(f"pixel_values has shape {pixel_values.shape}; want (B, {size}, {size}, 3)")
        b, n = pixel_values.shape[0], size // p
        cropped = pixel_values[:, : n * p, : n * p].astype(self.dtype)
        patches = cropped.reshape(b, n, p, n, p, 3).transpose(0, 1, 3, 2, 4, 5).reshape(b, n * n, p * p * 3)
        x = self.patch_embedding(patches)
        start = jnp.broadcast_to(self.class_embedding[...].astype(x.dtype), (b, 1, x.shape[-1]))
        x = jnp.concatenate([start, x], axis=1) + self.position_embedding(jnp.arange(n * n + 1))
        x = run_layers(self.layers, self.pre_norm(x), None, remat=self.remat)
        return self.projection(self.post_norm(x[:, 0]))


def similarity(image_embeds: jax.Array, text_embeds: jax.Array, logit_scale: jax.Array | float) -> jax.Array:
    """CLIP's logits, exp(logit_scale) times the cosine of each image with each text (arXiv:2103.00020).

    Args:
        image_embeds: (B, D), of any length.
        text_embeds: (C, D), of any length.
        logit_scale: ().

    Returns:
        (B, C) float32.
    """

    def unit(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    return jnp.matmul(jnp.exp(logit_scale) * unit(image_embeds), unit(text_embeds).T, precision="highest")
