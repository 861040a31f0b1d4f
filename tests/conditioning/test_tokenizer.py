"""Tokenizers in both dialects: recorded ids, cutting and its warning, folders of transformers, refusals. No torch."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conditioning.tokenizer_folders import (
    BANG,
    CASES,
    CAT,
    END,
    FOLDERS,
    MERGES,
    START,
    new_files,
    old_files,
    write_files,
)
from unclip_jax.conditioning.tokenizer import (
    Tokenizer,
    clip_tokenizer_json,
    open_clip_tokenizer_json,
    tokenizer_json_from_folder,
)

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


@pytest.mark.parametrize("prompts", ["a cat", ["a", None], ["a", 3], [b"a"], [["a"]]])
def test_prompts_are_a_sequence_of_strings(tokenizer, prompts):
    with pytest.raises(ValueError, match=r"^prompts(\[[01]\])?: expected .*string.*, got .+$"):
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
        (changed(), "clip", 77, "dialect 'clip': expected one of 'open_clip', 'transformers'"),
        (changed(), "open_clip", 1, "context_length 1: expected at least 2"),
        ("", "open_clip", 77, "tokenizer.json: not a tokenizer"),
        (changed()[:-5], "transformers", 77, "tokenizer.json: not a tokenizer"),
        (changed(padding=None), "open_clip", 77, "tokenizer.json: must store words, padding, and a start and an end"),
        (changed(pre_tokenizer=None), "open_clip", 77, "tokenizer.json: must store words"),
        (changed(post_processor=None), "transformers", 77, "tokenizer.json: must store words"),
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


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_every_release_give_the_same_ids(tmp_path, name):
    files, (ids, pad) = FOLDERS[name]
    tokenizer = Tokenizer.from_json(tokenizer_json_from_folder(write_files(tmp_path, files)), "transformers", 12)
    np.testing.assert_array_equal(tokenizer(["HI! <cat> <CAT>"])[0], padded([515, *ids, 516], 12, pad))
    assert tokenizer.vocabulary_size == 517 + (517 in ids) + ("<dog>" in json.dumps(files))


def test_merges_may_be_written_as_text(tmp_path):
    """tokenizer.json of earlier releases of the tokenizers library."""
    files = new_files()
    (tmp_path / "new").mkdir()
    new = tokenizer_json_from_folder(write_files(tmp_path / "new", files))
    files["tokenizer.json"]["model"]["merges"] = [" ".join(pair) for pair in MERGES]
    assert tokenizer_json_from_folder(write_files(tmp_path, files)) == new


TOKEN_EXPECTED = "expected a token, its text or an object with its content, got"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"merges.txt": None}, ": holds neither tokenizer.json nor vocab.json with merges.txt"),
        ({"vocab.json": None}, ": holds neither tokenizer.json nor vocab.json with"),
        ({"vocab.json": "{"}, "/vocab.json: not JSON: "),
        ({"vocab.json": []}, "/vocab.json: expected a JSON object, got list"),
        ({"vocab.json": {"a": "b"}}, "/vocab.json with merges.txt: not a byte-pair vocabulary"),
        ({"merges.txt": "a t</w>\nx y z\n"}, "/merges.txt: expected two tokens on a line, got 'x y z'"),
        ({"merges.txt": "a b\n"}, "/vocab.json with merges.txt: not a byte-pair vocabulary"),
        ({"tokenizer.json": {"model": {"type": "Unigram"}}}, "/tokenizer.json: expected a byte-pair model"),
        ({"tokenizer.json": {"model": {"vocab": {}, "merges": [["a"]]}}}, "/tokenizer.json: not a byte-pair"),
        ({"tokenizer.json": "[]"}, "/tokenizer.json: expected a JSON object, got list"),
        ({"tokenizer.json": new_files([{"content": "<cat>"}])["tokenizer.json"]}, "/tokenizer.json: added_tokens: "),
        ({"tokenizer_config.json": "1"}, "/tokenizer_config.json: expected a JSON object, got int"),
        ({"tokenizer_config.json": {"padding_side": "left"}}, "/tokenizer_config.json: padding_side is 'left'; only"),
        ({"tokenizer_config.json": {"pad_token": 5}}, f"/tokenizer_config.json: pad_token: {TOKEN_EXPECTED} 5"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"x": CAT}}}, "/tokenizer_config.json: added_tokens_deco"),
        ({"special_tokens_map.json": {"eos_token": {}}}, f"/special_tokens_map.json: eos_token: {TOKEN_EXPECTED} {{}}"),
        ({"added_tokens.json": {"<cat>": "517"}}, "/added_tokens.json: expected ids by token"),
    ],
)
def test_broken_folders_are_refused_by_name(tmp_path, files, message):
    with pytest.raises((ValueError, FileNotFoundError), match=f"^{re.escape(f'{tmp_path}{message}')}") as error:
        tokenizer_json_from_folder(write_files(tmp_path, old_files() | files))
    assert "\n" not in str(error.value)


def test_text_that_is_not_utf8(tmp_path):
    (write_files(tmp_path, old_files()) / "merges.txt").write_bytes(b"\xff \xfe")
    with pytest.raises(ValueError, match=r"merges\.txt: not UTF-8 text: "):
        tokenizer_json_from_folder(tmp_path)
