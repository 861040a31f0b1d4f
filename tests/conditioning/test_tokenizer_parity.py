"""Tokenizers against open_clip's and transformers' own, live.

The recorded ids of tests/golden/tokens.json are checked here too. To record them again with the references installed,
or after adding a case (its prompt is enough): `python -m tests.conditioning.test_tokenizer_parity`.
"""

import importlib.metadata
import json
import unicodedata
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer
from tokenizers import AddedToken
from transformers import CLIPTokenizer, CLIPTokenizerFast

from convert.tokenizer import tokenizer_json_from_folder
from tests.convert.tokenizer_folder import CASES, END, FOLDERS, GOLDEN, START, write_files
from unclip_jax.conditioning.tokenizer import Tokenizer, clip_tokenizer_json

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:the prompt is:UserWarning")]

PROMPTS = [case["prompt"] for case in CASES]
PACKAGES = ("open_clip_torch", "ftfy", "regex", "transformers", "tokenizers")
# Characters that no version of Unicode has assigned yet are left out: what counts as a letter depends on the version,
# and open_clip's `regex` and the `tokenizers` library are not of the same one.
text = st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=40)
hard = st.lists(st.one_of(text, st.sampled_from(PROMPTS), st.sampled_from([" ", "!", "<", START, END])), max_size=5)
hard_text = hard.map("".join)


OPEN_CLIP = SimpleTokenizer()


def open_clip_ids(prompts):
    return OPEN_CLIP(prompts).numpy().astype(np.int32)


def transformers_ids(reference, prompts, length=77):
    rows = reference(prompts, padding="max_length", truncation=True, max_length=length)["input_ids"]
    return np.array(rows, np.int32)


def write_clip_folder(folder):
    """open_clip's vocabulary as OpenAI's files name it, with the padding of Stable Diffusion 2's folders."""
    names = {"<start_of_text>": START, "<end_of_text>": END}
    vocabulary = {names.get(token, token): index for token, index in OPEN_CLIP.encoder.items()}
    merges = "#version: 0.2\n" + "\n".join(map(" ".join, OPEN_CLIP.bpe_ranks)) + "\n"
    files = {"vocab.json": vocabulary, "merges.txt": merges, "special_tokens_map.json": {"pad_token": "!"}}
    return write_files(folder, files)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """transformers' tokenizer and ours, of the same folder."""
    folder = write_clip_folder(tmp_path_factory.mktemp("clip"))
    ours = Tokenizer.from_json(tokenizer_json_from_folder(folder), "transformers")
    return CLIPTokenizer.from_pretrained(folder), ours


@pytest.fixture(scope="module")
def shipped():
    return Tokenizer.from_json(clip_tokenizer_json(), "open_clip")


def test_the_recorded_ids_are_the_references(clip):
    recorded = {name: [case[name] for case in CASES] for name in ("open_clip", "transformers")}
    live = {"open_clip": open_clip_ids(PROMPTS), "transformers": transformers_ids(clip[0], PROMPTS)}
    assert {name: [np.trim_zeros(row, "b").tolist() for row in rows] for name, rows in live.items()} == recorded


def test_the_vocabulary_is_open_clips(shipped):
    vocabulary = json.loads(shipped.json)
    ids = vocabulary["model"]["vocab"] | {entry["content"]: entry["id"] for entry in vocabulary["added_tokens"]}
    assert ids == OPEN_CLIP.encoder


@settings(max_examples=300)
@given(prompt=hard_text)
def test_open_clip_agrees_token_for_token(shipped, prompt):
    np.testing.assert_array_equal(shipped([prompt]), open_clip_ids([prompt]))


@settings(max_examples=300)
@given(prompt=hard_text)
def test_transformers_agrees_token_for_token(clip, prompt):
    reference, ours = clip
    np.testing.assert_array_equal(ours([prompt]), transformers_ids(reference, [prompt]))


@pytest.mark.parametrize("block", range(0, 0x20000, 0x4000), ids=hex)
def test_every_character_in_every_position(shipped, clip, block):
    """Alone, in a word, after punctuation and after a digit: white space, letters, marks and cases are told the same.

    Later planes hold ideographs, tags and private use alone.
    """
    known = [chr(i) for i in range(block, block + 0x4000) if unicodedata.category(chr(i)) not in ("Cs", "Cn")]
    prompts = [f"a{c} {c}b !{c} 1{c}{c} '{c}" for c in known]
    np.testing.assert_array_equal(shipped(prompts), open_clip_ids(prompts))
    np.testing.assert_array_equal(clip[1](prompts), transformers_ids(clip[0], prompts))


def agree(folder, reference, length=24):
    """Of a folder's tokenizers: every recorded prompt and some with tokens that folders add."""
    ours = Tokenizer.from_json(tokenizer_json_from_folder(folder), "transformers", length)
    prompts = ["HI! <cat> <CAT>", "a <cat>cat<cat>!<dog>", "at<dog> <CAT> !hi<|endoftext|>!", *PROMPTS]
    np.testing.assert_array_equal(ours(prompts), transformers_ids(reference, prompts, length))
    assert ours.vocabulary_size == max(reference.get_vocab().values()) + 1


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(tmp_path, name):
    folder = write_files(tmp_path, FOLDERS[name][0])
    agree(folder, CLIPTokenizer.from_pretrained(folder))


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_that_transformers_wrote(tmp_path, name):
    """Opened and saved again, with a token added that has flags of its own."""
    (tmp_path / "first").mkdir()
    reference = CLIPTokenizerFast.from_pretrained(write_files(tmp_path / "first", FOLDERS[name][0]))
    reference.add_tokens([AddedToken("<dog>", lstrip=True, normalized=False), "<Pig>"])
    reference.save_pretrained(tmp_path / "second")
    agree(tmp_path / "second", reference)
    agree(tmp_path / "second", CLIPTokenizer.from_pretrained(tmp_path / "second"))


def record():
    """Writes tests/golden/tokens.json anew from its own prompts."""
    with TemporaryDirectory() as folder:
        reference = CLIPTokenizer.from_pretrained(write_clip_folder(Path(folder)))
    rows = {"open_clip": open_clip_ids(PROMPTS), "transformers": transformers_ids(reference, PROMPTS)}
    cases = [
        {"prompt": prompt} | {dialect: np.trim_zeros(ids[i], "b").tolist() for dialect, ids in rows.items()}
        for i, prompt in enumerate(PROMPTS)
    ]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    about = (
        f"Ids of open_clip's SimpleTokenizer and transformers' CLIPTokenizer (padding token '!'), context length 77, "
        f"without the padding (id 0) at the end. Recorded with {versions}."
    )
    lines = ",\n".join(json.dumps(case) for case in cases)
    GOLDEN.write_text(f'{{\n"about": {json.dumps(about)},\n"cases": [\n{lines}\n]\n}}\n', "utf-8")


if __name__ == "__main__":
    record()
