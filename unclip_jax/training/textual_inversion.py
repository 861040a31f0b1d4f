"""New words for a text encoder, learnt from pictures (Gal et al. 2022, arXiv:2208.01618); everything else stays.

A word is a placeholder such as "<my-cat>" and one or more vectors, which are the tokens "<my-cat>", "<my-cat>_1" … of
the prompt, as diffusers has it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.conditioning.tokenizer import Tokenizer

EMBEDDING = "token_embedding.embedding"


def placeholder_tokens(placeholder: str, vectors: int) -> list[str]:
    """The tokens that a placeholder of so many vectors stands for."""
    return [placeholder, *(f"{placeholder}_{index}" for index in range(1, vectors))]


def with_placeholder(tokenizer: Tokenizer, placeholder: str, vectors: int) -> tuple[Tokenizer, list[int]]:
    """The tokenizer with the placeholder's tokens, and their ids, which follow all others.

    Raises ValueError for a placeholder with white space, and for one that the tokenizer knows already as one token.
    """
    if not placeholder or re.search(r"\s", placeholder) or vectors < 1:
        raise ValueError(f"placeholder is {placeholder!r} of {vectors} vectors; want a word, and at least one vector")
    tokens = placeholder_tokens(placeholder, vectors)
    if known := sorted(set(tokens) & tokenizer.known_tokens):
        raise ValueError(f"placeholder {placeholder!r}: the tokenizer has the token {known[0]!r} already")
    first = tokenizer.vocabulary_size
    data = json.loads(tokenizer.json)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    ids = [first + index for index in range(vectors)]
    added = [{"id": i, "content": token, **flags} for i, token in zip(ids, tokens, strict=True)]
    data["added_tokens"] = [*data.get("added_tokens", []), *added]
    wider = Tokenizer.from_json(json.dumps(data), tokenizer.dialect, tokenizer.context_length)
    return wider, ids


def expand(prompt: str, placeholder: str, vectors: int) -> str:
    """A prompt with the placeholder's other tokens after it."""
    return prompt.replace(placeholder, " ".join(placeholder_tokens(placeholder, vectors)))


def with_rows(params: Mapping[str, Any], rows: jax.Array) -> dict[str, Any]:
    """A text encoder's parameters with rows (n, width) after its vocabulary's: of the ids that `with_placeholder` gave.

    Pure, so that a loss of the result has gradients with respect to the rows alone.
    """
    table = params[EMBEDDING]
    return {**params, EMBEDDING: jnp.concatenate([table, rows.astype(table.dtype)])}


def initial_rows(params: Mapping[str, Any], ids: Sequence[int], vectors: int) -> jax.Array:
    """What to begin from: the vectors of an existing word's tokens, repeated as often as there are vectors."""
    table = np.asarray(params[EMBEDDING], np.float32)
    if not ids:
        raise ValueError("initial word: has no tokens; want a word that the tokenizer knows")
    return jnp.asarray(table[[ids[index % len(ids)] for index in range(vectors)]])
