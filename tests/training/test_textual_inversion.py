"""New words: their tokens come after all others, in both dialects, whatever is written around them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import small_models
from unclip_jax.adapters.textual_inversion import EMBEDDING, with_placeholder
from unclip_jax.conditioning.tokenizer import Tokenizer, open_clip_tokenizer_json
from unclip_jax.models.clip import TextEncoder
from unclip_jax.training.initial import initial_network
from unclip_jax.training.textual_inversion import expand, initial_rows, with_rows


@pytest.fixture(params=["open_clip", "transformers"])
def tokenizer(request):
    return Tokenizer.from_json(open_clip_tokenizer_json([]), request.param, 24)


@pytest.mark.parametrize("vectors", [1, 3])
def test_a_placeholder_becomes_its_tokens(tokenizer, vectors):
    wider, ids = with_placeholder(tokenizer, "<my-cat>", vectors)
    assert ids == list(range(514, 514 + vectors))
    around = (tokenizer.tokens("a ")), tokenizer.tokens("!")
    got = wider.tokens(expand("a <my-cat>!", "<my-cat>", vectors))
    assert got == [*around[0], *ids, *around[1]]
    assert wider.tokens("a my cat") == tokenizer.tokens("a my cat")
    assert wider.vocabulary_size == 514 + vectors


def test_two_words_are_told_apart(tokenizer):
    once, first = with_placeholder(tokenizer, "<a>", 1)
    twice, second = with_placeholder(once, "<ab>", 2)
    assert twice.tokens("<ab> <a>") == [second[0], first[0]]


@pytest.mark.parametrize("word", ["", "two words", "a"])
def test_what_is_no_new_word_is_refused(tokenizer, word):
    with pytest.raises(ValueError, match="placeholder"):
        with_placeholder(tokenizer, word, 1)


@pytest.mark.e2e
def test_rows_are_looked_up_and_have_gradients():
    network = initial_network(TextEncoder, small_models.TEXT, 0)
    rows = initial_rows(network.params, [5, 6], 3)
    np.testing.assert_array_equal(rows, np.asarray(network.params[EMBEDDING])[[5, 6, 5]])
    tokens = jnp.array([[512, 514, 515, 513, 0, 0]])
    same = jnp.array([[512, 5, 6, 513, 0, 0]])
    base = network.merge()(same)
    np.testing.assert_allclose(network.merge(with_rows(network.params, rows))(tokens), base, atol=1e-6)
    gradient = jax.grad(lambda r: jnp.square(network.merge(with_rows(network.params, r))(tokens)[:, 1:].sum()))(rows)
    assert (jnp.abs(gradient).max(axis=1) > 0).tolist() == [True, True, False]
    with pytest.raises(ValueError, match="has no tokens"):
        initial_rows(network.params, [], 1)
