"""The diffusion prior of unCLIP: a causal transformer that predicts a CLIP image embedding from a text.

Ramesh et al. 2022 (arXiv:2204.06125), as Karlo trained it for OpenAI's ViT-L/14. It reads a sequence

    the text's tokens | the text's embedding | the timestep | the noisy image embedding | a learnt token

and predicts, at the last position, the clean image embedding, normalised by the statistics of such embeddings.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from unclip_jax.models.clip import run_layers, stack_layers
from unclip_jax.models.configs import PriorConfig
from unclip_jax.models.layers import Embed, Linear, layer_norm, or_zeros
from unclip_jax.models.timestep import timestep_embedding

EXTRA_TOKENS = 4  # behind the text: its embedding, the timestep, the noisy image embedding, and the learnt token


class PriorTimeEmbedding(nnx.Module):
    """Linear, SiLU, linear. Call: sinusoids (B, width) -> (B, width)."""

    def __init__(self, width: int, **kw: Any):
        self.linear_1 = Linear(width, width, **kw)
        self.linear_2 = Linear(width, width, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_2(nnx.silu(self.linear_1(x)))


class Prior(nnx.Module):
    """The prior's network. Call: x (B, D), timesteps (B,), text_states (B, S, D), text_embeds (B, D), text_mask (B, S).

    x is the noisy image embedding, normalised. text_states and text_embeds come from the text tower, after its final
    norm and un-normalised. text_mask is bool, true up to and including the end token. Returns the clean embedding (B,
    D). A loop calls the parts: `encode_text` and `embed_time` once, `denoise` at each step.

    Args:
        config: The architecture.
        dtype: Of computation.
        param_dtype: Of the parameters.
    """

    def __init__(
        self,
        config: PriorConfig,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kw: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        width, dim = config.width, config.embedding_dim
        self.config = config
        self.dtype = dtype
        self.text_states_proj = Linear(dim, width, rngs=rngs, **kw)
        self.text_embeds_proj = Linear(dim, width, rngs=rngs, **kw)
        self.time_embedding = PriorTimeEmbedding(width, rngs=rngs, **kw)
        self.proj_in = Linear(dim, width, rngs=rngs, **kw)
        normal = or_zeros(nnx.initializers.normal(0.01))
        self.last_token = nnx.Param(normal(rngs.params(), (width,), param_dtype))
        self.position_embedding = Embed(config.context_length + EXTRA_TOKENS, width, rngs=rngs, **kw)
        self.layers = stack_layers(config, rngs, **kw)
        self.final_norm = layer_norm(width, rngs=rngs, **kw)
        self.proj_out = Linear(width, dim, rngs=rngs, **kw)

    def __call__(
        self,
        x: jax.Array,
        timesteps: jax.Array,
        text_states: jax.Array,
        text_embeds: jax.Array,
        text_mask: jax.Array,
    ) -> jax.Array:
        return self.denoise(x, self.embed_time(timesteps), self.encode_text(text_states, text_embeds, text_mask))

    def encode_text(
        self, text_states: jax.Array, text_embeds: jax.Array, text_mask: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The text's contribution to every step, without positions: its tokens, and the attention mask.

        No token attends to later ones or to padding.

        Args:
            text_states: (B, S, D).
            text_embeds: (B, D).
            text_mask: (B, S).

        Returns:
            Tokens (B, S + 1, width), and the attention's bias (B, 1, S + 4, S + 4).

        Raises:
            ValueError: The text has another length than the prior takes.
        """
        length = self.config.context_length
        if text_states.shape[1] != length:
            raise ValueError(f"text_states has {text_states.shape[1]} tokens; want {length}")
        tokens = [self.text_states_proj(text_states), self.text_embeds_proj(text_embeds)[:, None]]
        seen = jnp.pad(text_mask, ((0, 0), (0, EXTRA_TOKENS)), constant_values=True)
        past = np.tri(length + EXTRA_TOKENS, dtype=bool)
        bias = jnp.where(seen[:, None, None, :] & past, 0.0, -jnp.inf)
        return jnp.concatenate(tokens, axis=1), bias

    def embed_time(self, timesteps: jax.Array) -> jax.Array:
        """timesteps: (B,) -> (B, width)."""
        return self.time_embedding(timestep_embedding(timesteps, self.config.width).astype(self.dtype))

    def denoise(self, x: jax.Array, time: jax.Array, text: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Predicts the clean embedding.

        Args:
            x: (B, D), the noisy embedding.
            time: (B or 1, width), from `embed_time`.
            text: From `encode_text`.

        Returns:
            (B, D).
        """
        tokens, bias = text
        last = self.last_token[...].astype(tokens.dtype)
        rows = [jnp.broadcast_to(row, tokens[:, 0].shape) for row in (time, self.proj_in(x), last)]
        h = jnp.concatenate([tokens, jnp.stack(rows, axis=1)], axis=1)
        h = run_layers(self.layers, h + self.position_embedding(jnp.arange(h.shape[1])), bias)
        return self.proj_out(self.final_norm(h[:, -1]))
