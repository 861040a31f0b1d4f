"""Learnt words: a pure change of tokenizer and table, in both dialects."""

import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.adapters.textual_inversion import EMBEDDING, add_words, expand_words
from unclip_jax.checkpoints.networks import Network
from unclip_jax.conditioning.tokenizer import Tokenizer, open_clip_tokenizer_json

WORDS = {"<cat>": np.arange(12, dtype=np.float32).reshape(3, 4), "<a>": np.full(4, 7, np.float16)}


@pytest.fixture(params=["open_clip", "transformers"])
def tokenizer(request):
    return Tokenizer.from_json(open_clip_tokenizer_json([]), request.param, 24)


def encoder(rows=514, width=4):
    return Network(None, {EMBEDDING: jnp.zeros((rows, width)), "other": jnp.ones(3)})


@pytest.mark.parametrize("rows", [514, 520])
def test_rows_stand_where_the_ids_point(tokenizer, rows):
    """Also in a table that has rows to spare."""
    base = encoder(rows)
    wider, network = add_words(tokenizer, base, WORDS)
    table = network.params[EMBEDDING]
    assert table.shape == (518, 4)
    ids = wider.tokens(expand_words(wider, "<cat><a>"))
    np.testing.assert_array_equal(table[np.array(ids)], [*WORDS["<cat>"], WORDS["<a>"]])
    assert base.params[EMBEDDING].shape == (rows, 4)
    assert tokenizer.vocabulary_size == 514
    assert network.params["other"] is base.params["other"]


def test_prompts_are_written_out(tokenizer):
    wider, _ = add_words(tokenizer, encoder(), WORDS)
    whole = "<cat> <cat>_1 <cat>_2"
    assert expand_words(wider, "a <cat>, <a> and <cat>_1") == f"a {whole}, <a> and <cat>_1"
    assert expand_words(tokenizer, "a <cat>") == "a <cat>"
    assert expand_words(wider, "") == ""


def test_case_does_not_matter():
    wider, _ = add_words(Tokenizer.from_json(open_clip_tokenizer_json([]), "open_clip", 24), encoder(), WORDS)
    assert wider.tokens("<CAT>x") == wider.tokens("<cat>x") == [514, *wider.tokens("x")]


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"<x>": np.ones((2, 5))}, r"word '<x>' has shape \(2, 5\); want \(vectors, 4\)"),
        ({"<x>": np.ones((0, 4))}, r"\(0, 4\)"),
        ({"two words": np.ones(4)}, "two words"),
        ({"a": np.ones(4)}, "has the token 'a'"),
    ],
)
def test_what_is_no_word_is_refused(tokenizer, words, match):
    with pytest.raises(ValueError, match=match):
        add_words(tokenizer, encoder(), words)
    with pytest.raises(ValueError, match="514 ids, the text encoder 500 rows"):
        add_words(tokenizer, encoder(500), {"<x>": np.ones(4)})
