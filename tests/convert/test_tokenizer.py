"""Folders of transformers' tokenizers: what is read of them, and what is refused, by name. No torch."""

import json
import re

import numpy as np
import pytest

from convert.readers import CheckpointError
from convert.tokenizer import open_tokenizer, tokenizer_json_from_folder
from tests.convert.tokenizer_folder import CAT, FOLDERS, MERGES, new_files, old_files, write_files
from unclip_jax.conditioning.tokenizer import Tokenizer


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(tmp_path, name):
    files, (ids, pad) = FOLDERS[name]
    tokenizer = Tokenizer.from_json(tokenizer_json_from_folder(write_files(tmp_path, files)), "transformers", 12)
    np.testing.assert_array_equal(tokenizer(["HI! <cat> <CAT>"])[0], [515, *ids, 516] + [pad] * (10 - len(ids)))
    assert tokenizer.vocabulary_size == 517 + (517 in ids) + ("<dog>" in json.dumps(files))


def test_merges_may_be_written_as_text(tmp_path):
    """tokenizer.json of earlier releases of the tokenizers library."""
    files = new_files()
    (tmp_path / "new").mkdir()
    new = tokenizer_json_from_folder(write_files(tmp_path / "new", files))
    files["tokenizer.json"]["model"]["merges"] = [" ".join(pair) for pair in MERGES]
    assert tokenizer_json_from_folder(write_files(tmp_path, files)) == new


WANT_TOKEN = "; want a token, its text or an object with its content"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"vocab.json": "{"}, "vocab.json: is not valid JSON ("),
        ({"vocab.json": []}, "vocab.json holds a list; want a JSON object"),
        ({"vocab.json": '{"a": 0, "a": 1}'}, "vocab.json: 'a' is there twice"),
        ({"vocab.json": {"a": "b"}}, "vocab.json with merges.txt: not a byte-pair vocabulary"),
        ({"merges.txt": "a t</w>\nx y z\n"}, "merges.txt: a line is 'x y z'; want two tokens"),
        ({"merges.txt": "a b\n"}, "vocab.json with merges.txt: not a byte-pair vocabulary"),
        ({"tokenizer.json": {"model": {"type": "Unigram"}}}, "tokenizer.json: model is of type 'Unigram'; want BPE"),
        ({"tokenizer.json": {"model": [[]]}}, "tokenizer.json: model is of type a list; want BPE"),
        ({"tokenizer.json": {"model": {"merges": None}}}, "tokenizer.json: merges is None; want a list"),
        ({"tokenizer.json": {"model": {"vocab": {}, "merges": [["a"]]}}}, "tokenizer.json: not a byte-pair"),
        ({"tokenizer.json": "[]"}, "tokenizer.json holds a list; want a JSON object"),
        (
            {"tokenizer.json": new_files([{"content": "<cat>"}])["tokenizer.json"]},
            "tokenizer.json: added_tokens is a list; want a list of tokens with their ids",
        ),
        ({"tokenizer_config.json": "1"}, "tokenizer_config.json holds a int; want a JSON object"),
        ({"tokenizer_config.json": {"padding_side": "left"}}, "tokenizer_config.json: padding_side is 'left'; want 'r"),
        ({"tokenizer_config.json": {"pad_token": 5}}, f"tokenizer_config.json: pad_token is 5{WANT_TOKEN}"),
        (
            {"tokenizer_config.json": {"extra_special_tokens": [None]}},
            f"tokenizer_config.json: one of additional_special_tokens is None{WANT_TOKEN}",
        ),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {"x": CAT}}},
            "tokenizer_config.json: added_tokens_decoder has the id 'x'; want a number",
        ),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": [CAT]}},
            "tokenizer_config.json: added_tokens_decoder is a list; want an object of tokens by id",
        ),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {"5": {}}}},
            f"tokenizer_config.json: added_tokens_decoder: 5 is a dict{WANT_TOKEN}",
        ),
        ({"special_tokens_map.json": {"eos_token": {}}}, f"special_tokens_map.json: eos_token is a dict{WANT_TOKEN}"),
        ({"added_tokens.json": {"<cat>": "517"}}, "added_tokens.json: '<cat>' is '517'; want its id, a number"),
    ],
)
def test_broken_folders_are_refused_by_name(tmp_path, files, message):
    write_files(tmp_path, old_files() | files)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{tmp_path.name}/{message}')}") as error:
        tokenizer_json_from_folder(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match=f"^{re.escape(f'tokenizer: {tmp_path.name}/{message}')}"):
        open_tokenizer(tmp_path, 12)


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
def test_a_folder_without_a_vocabulary_is_refused(tmp_path, missing):
    write_files(tmp_path, old_files() | {missing: None})
    message = f"{tmp_path}: holds neither tokenizer.json nor vocab.json with merges.txt"
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
        tokenizer_json_from_folder(tmp_path)
    with pytest.raises(CheckpointError, match=f"^{re.escape(f'tokenizer: {message}')}$"):
        open_tokenizer(tmp_path, 12)


def test_text_that_is_not_utf8(tmp_path):
    (write_files(tmp_path, old_files()) / "merges.txt").write_bytes(b"\xff \xfe")
    with pytest.raises(ValueError, match=r"merges\.txt: is not UTF-8 text \("):
        tokenizer_json_from_folder(tmp_path)
