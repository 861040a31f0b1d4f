"""Training textual inversion embeddings for a text encoder (Gal et al. 2022, arXiv:2208.01618); all else is frozen.

An embedding is a placeholder word such as "<my-cat>" and one or more vectors; its tokens are those of
`unclip_jax.adapters.textual_inversion`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.adapters.textual_inversion import EMBEDDING, placeholder_tokens


def expand(prompt: str, placeholder: str, vectors: int) -> str:
    """A prompt with the placeholder's other tokens after it."""
    return prompt.replace(placeholder, " ".join(placeholder_tokens(placeholder, vectors)))


def with_rows(params: Mapping[str, Any], rows: jax.Array) -> dict[str, Any]:
    """A text encoder's parameters with rows (n, width) after its vocabulary's, for the ids from `with_placeholder`.

    Pure, so that a loss of the result has gradients with respect to the rows alone.
    """
    table = params[EMBEDDING]
    return {**params, EMBEDDING: jnp.concatenate([table, rows.astype(table.dtype)])}


def initial_rows(params: Mapping[str, Any], ids: Sequence[int], vectors: int) -> jax.Array:
    """The initial vectors: those of an existing word's tokens, repeated as often as needed.

    Raises:
        ValueError: The word has no tokens.
    """
    table = np.asarray(params[EMBEDDING], np.float32)
    if not ids:
        raise ValueError("initial word has no tokens; want a word that the tokenizer knows")
    return jnp.asarray(table[[ids[index % len(ids)] for index in range(vectors)]])
