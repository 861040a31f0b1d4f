"""Textual inversion embeddings (Gal et al. 2022, arXiv:2208.01618): new tokens, and their rows for a text encoder.

A word with several vectors has the tokens "word", "word_1", "word_2" …, as in diffusers: `expand_words` writes them out
in a prompt.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from unclip_jax.checkpoints.networks import Network
from unclip_jax.conditioning.tokenizer import Tokenizer

EMBEDDING = "token_embedding.embedding"


def placeholder_tokens(word: str, vectors: int) -> list[str]:
    """The tokens of a word with this number of vectors."""
    return [word, *(f"{word}_{index}" for index in range(1, vectors))]


def with_placeholder(tokenizer: Tokenizer, word: str, vectors: int) -> tuple[Tokenizer, list[int]]:
    """Adds a word's tokens to a tokenizer.

    Args:
        tokenizer: The tokenizer.
        word: The word.
        vectors: The number of its vectors.

    Returns:
        The new tokenizer, and the tokens' ids, which follow all others.

    Raises:
        ValueError: The word has white space, or the tokenizer knows one of the tokens already.
    """
    if not word or re.search(r"\s", word) or vectors < 1:
        raise ValueError(f"placeholder is {word!r} of {vectors} vectors; want a word, and at least one vector")
    tokens = placeholder_tokens(word, vectors)
    if known := sorted(set(tokens) & tokenizer.known_tokens):
        raise ValueError(f"placeholder is {word!r}; want a new one: the tokenizer has the token {known[0]!r}")
    first = tokenizer.vocabulary_size
    data = json.loads(tokenizer.json)
    # "normalized": found in a prompt in any case, like the rest of CLIP's vocabulary.
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    ids = [first + index for index in range(vectors)]
    added = [{"id": i, "content": token, **flags} for i, token in zip(ids, tokens, strict=True)]
    data["added_tokens"] = [*data.get("added_tokens", []), *added]
    wider = Tokenizer.from_json(json.dumps(data), tokenizer.dialect, tokenizer.context_length)
    return wider, ids


def add_words(tokenizer: Tokenizer, text_encoder: Network, words: Mapping[str, Any]) -> tuple[Tokenizer, Network]:
    """A tokenizer and a text encoder with new words; the given ones are not modified.

    Args:
        tokenizer: The tokenizer.
        text_encoder: The text encoder.
        words: word -> rows (n, width), or (width,) for a word with one vector.

    Returns:
        The new tokenizer and text encoder.

    Raises:
        ValueError: A word is invalid or known already, or the rows have another width.
    """
    encoder = with_rows(text_encoder, tokenizer.vocabulary_size, words)
    for word, rows in words.items():
        tokenizer, _ = with_placeholder(tokenizer, word, rows.size // rows.shape[-1])
    return tokenizer, encoder


def with_rows(text_encoder: Network, first: int, words: Mapping[str, Any]) -> Network:
    """A text encoder with the rows of words, one after the other, for the ids from `first` on.

    Args:
        text_encoder: The text encoder.
        first: The first id.
        words: As in `add_words`.

    Returns:
        The new text encoder.

    Raises:
        ValueError: The rows have another width, or the first id is beyond the table.
    """
    table = text_encoder.params[EMBEDDING]
    width = table.shape[1]
    if first > table.shape[0] and words:
        raise ValueError(
            f"word {next(iter(words))!r}: the tokenizer has {first} ids, the text encoder {table.shape[0]} rows"
        )
    # A table may have spare rows, for ids that the tokenizer does not use.
    pieces = [table[:first]]
    for word, rows in words.items():
        if rows.ndim not in (1, 2) or not rows.size or rows.shape[-1] != width:
            raise ValueError(f"word {word!r} has shape {rows.shape}; want (vectors, {width}) for this text encoder")
        pieces.append(jnp.asarray(rows).reshape(-1, width).astype(table.dtype))
    return (
        Network(text_encoder.graphdef, {**text_encoder.params, EMBEDDING: jnp.concatenate(pieces)})
        if words
        else text_encoder
    )


def expand_words(tokenizer: Tokenizer, prompt: str) -> str:
    """A prompt in which each word with several vectors is followed by its other tokens, as in diffusers.

    A word is only expanded as it was given: in other case it stands for its first vector.
    """
    known = tokenizer.added_tokens
    longest_first = sorted(known, key=len, reverse=True)
    if not any(f"{word}_1" in known for word in known):
        return prompt

    def whole(match: re.Match[str]) -> str:
        tokens, index = [match[0]], 1
        while (token := f"{match[0]}_{index}") in known:
            tokens.append(token)
            index += 1
        return " ".join(tokens)

    return re.sub("|".join(map(re.escape, longest_first)), whole, prompt)
