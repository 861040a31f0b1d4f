"""Tokenizers in both dialects: recorded ids, cutting and its warning, refusals. No torch."""

import html
import json
import re

import ftfy
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.tokenizer import tokenizer_json_from_folder
from tests.convert.tokenizer_folder import BANG, CASES, END, MERGES, START, write_files
from unclip_jax.conditioning.tokenizer import Tokenizer, clean, clip_tokenizer_json, open_clip_tokenizer_json

DIALECTS = ("open_clip", "transformers")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Dialect -> CLIP's tokenizer; in dialect "transformers" with Stable Diffusion 2's padding."""
    model = json.loads(clip_tokenizer_json())["model"]
    names = {"<start_of_text>": START, "<end_of_text>": END}
    model["vocab"] = {names.get(token, token): index for token, index in model["vocab"].items()}
    files = {"tokenizer.json": {"model": model}, "special_tokens_map.json": BANG}
    folder = write_files(tmp_path_factory.mktemp("clip"), files)
    texts = {"open_clip": clip_tokenizer_json(), "transformers": tokenizer_json_from_folder(folder)}
    return {dialect: Tokenizer.from_json(text, dialect) for dialect, text in texts.items()}


@pytest.fixture(scope="module")
def short_tokenizers(tokenizers):
    return {dialect: Tokenizer.from_json(long.json, dialect, 5) for dialect, long in tokenizers.items()}


@pytest.fixture(params=DIALECTS)
def tokenizer(tokenizers, request):
    return tokenizers[request.param]


def padded(ids, length=77, pad=0):
    return np.array(ids + [pad] * (length - len(ids)), np.int32)


@pytest.mark.filterwarnings("ignore:the prompt is:UserWarning")
@pytest.mark.parametrize("case", CASES, ids=[f"{case['prompt'][:20]!a}" for case in CASES])
def test_ids_are_those_recorded(tokenizer, case):
    np.testing.assert_array_equal(tokenizer([case["prompt"]])[0], padded(case[tokenizer.dialect]))


@pytest.mark.parametrize("count", [0, 1, 73, 74, 75])
def test_what_fits_is_whole_and_silent(tokenizer, count):
    """With start and end 75, 76 and 77 ids; a warning would be an error."""
    np.testing.assert_array_equal(tokenizer(["cat " * count])[0], padded([49406, *[2368] * count, 49407]))


@pytest.mark.parametrize(
    ("rest", "count", "quoted"),
    [
        ("dog", 76, "dog"),
        ("A  red Fox,\nrunning", 80, "a red fox , running"),
        ("dog " * 90, 165, "dog " * 89 + "dog"),
        ("\\ ' \"", 78, "\\ ' \""),
    ],
)
def test_the_warning_quotes_what_was_dropped(tokenizer, rest, count, quoted):
    message = f"the prompt is {count} tokens long and only 75 fit; dropped: {quoted!r}"
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$") as caught:
        ids = tokenizer(["cat " * 75 + rest])
    assert [warning.filename for warning in caught] == [__file__]  # the caller's line
    np.testing.assert_array_equal(ids[0], [49406, *[2368] * 75, 49407])


def test_a_character_may_be_cut(tokenizer):
    """U+20000 is four tokens: the first fits, the rest is no text and is quoted as such."""
    with pytest.warns(UserWarning, match="dropped: '\ufffd{3}'$"):
        cut = tokenizer(["cat " * 74 + "\U00020000"])[0]
    np.testing.assert_array_equal(cut[75:], [tokenizer(["\U00020000"])[0, 1], 49407])


def test_each_long_prompt_has_its_warning(tokenizer):
    end = {"open_clip": "<end_of_text>", "transformers": END}[tokenizer.dialect]
    with pytest.warns(UserWarning, match="^the prompt is") as caught:
        tokenizer(["cat " * 76, "short", "dog " * 75 + end])
    assert [str(warning.message).split("dropped: ")[1] for warning in caught] == ["'cat'", repr(end)]


ascii_word = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=8)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.filterwarnings("ignore:the prompt is:UserWarning")
@given(prompts=st.lists(st.text(max_size=30), max_size=4))
def test_a_row_is_start_tokens_end_and_padding(tokenizers, short_tokenizers, dialect, prompts):
    """Any text: start, tokens, end, padding; a batch is its prompts one by one; a short row is the long one cut."""
    tokenizer = tokenizers[dialect]
    rows, short = tokenizer(prompts), short_tokenizers[dialect](prompts)
    assert (rows.shape, rows.dtype, short.shape) == ((len(prompts), 77), np.int32, (len(prompts), 5))
    assert tokenizer.vocabulary_size == 49408
    for row, cut, prompt in zip(rows, short, prompts, strict=True):
        assert ((row >= 0) & (row < 49408)).all()
        end = int((row == 49407).argmax())
        assert (row[0], row[end]) == (49406, 49407)
        assert not row[end + 1 :].any()
        np.testing.assert_array_equal(cut, row[:5] if end < 5 else [*row[:4], 49407])
        np.testing.assert_array_equal(tokenizer([prompt])[0], row)


@pytest.mark.parametrize("dialect", DIALECTS)
@given(words=st.lists(ascii_word, max_size=8))
def test_words_are_independent(tokenizers, dialect, words):
    """Of plain ASCII: words between white space, in any case, have their own tokens wherever they stand."""
    row = tokenizers[dialect]([" \n ".join(words)])[0].tolist()
    singles = [tokenizers[dialect]([word.upper()])[0].tolist() for word in words]
    tokens = [index for single in singles for index in single[1 : single.index(49407)]]
    np.testing.assert_array_equal(row, padded([49406, *tokens, 49407]))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("a cat", "prompts is the string 'a cat'; want a sequence of strings"),
        (["a", None], "prompts[1] is of type NoneType; want a string"),
        (["a", 3], "prompts[1] is of type int; want a string"),
        ([b"a"], "prompts[0] is of type bytes; want a string"),
        ([["a"]], "prompts[0] is of type list; want a string"),
    ],
)
def test_prompts_are_a_sequence_of_strings(tokenizer, prompts, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        tokenizer(prompts)


def test_half_of_a_surrogate_pair(tokenizers):
    """ftfy replaces it; the fast tokenizer of transformers cannot read it."""
    np.testing.assert_array_equal(tokenizers["open_clip"](["a \ud800"]), tokenizers["open_clip"](["a \ufffd"]))
    with pytest.raises(ValueError, match=r"^prompts\[1\] 'a \\ud800': cannot be encoded: "):
        tokenizers["transformers"](["a", "a \ud800"])


def changed(**entries):
    """A working tokenizer.json with some of its entries replaced."""
    return json.dumps(json.loads(open_clip_tokenizer_json(MERGES)) | entries)


@pytest.mark.parametrize(
    ("text", "dialect", "length", "message"),
    [
        (changed(), "clip", 77, "dialect is 'clip'; accepted: 'open_clip', 'transformers'"),
        (changed(), "open_clip", 1, "context_length is 1; want at least 2"),
        ("", "open_clip", 77, "tokenizer.json: not a tokenizer"),
        (changed()[:-5], "transformers", 77, "tokenizer.json: not a tokenizer"),
        (changed(padding=None), "open_clip", 77, "tokenizer.json lacks padding, a pre_tokenizer, or"),
        (changed(pre_tokenizer=None), "open_clip", 77, "tokenizer.json lacks padding, a pre_tokenizer, or"),
        (changed(post_processor=None), "transformers", 77, "tokenizer.json lacks padding, a pre_tokenizer, or"),
    ],
)
def test_texts_that_are_no_tokenizer_are_refused(text, dialect, length, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as error:
        Tokenizer.from_json(text, dialect, length)
    assert "\n" not in str(error.value)


def test_the_shortest_row_is_start_and_end(tokenizer):
    with pytest.warns(UserWarning, match="^the prompt is 2 tokens long and only 0 fit; dropped: 'a cat'$"):
        ids = Tokenizer.from_json(tokenizer.json, tokenizer.dialect, 2)(["a cat"])
    np.testing.assert_array_equal(ids, [[49406, 49407]])


def test_merges_must_follow_from_each_other():
    with pytest.raises(ValueError, match=r"^merges: not a byte-pair vocabulary"):
        open_clip_tokenizer_json([("at", "om</w>")])


@given(st.text(st.characters(max_codepoint=0x17F)) | st.text("&;#x26ltampLT<> \t\r\n\x1b[31m\x00\x7f"))
def test_cleaning_is_that_of_ftfy_also_where_nothing_is_to_be_repaired(text):
    assert clean(text) == " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()
