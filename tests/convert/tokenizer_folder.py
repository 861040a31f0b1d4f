"""Folders of transformers' CLIPTokenizer as one finds them, with a small vocabulary."""

import json
from pathlib import Path

from unclip_jax.conditioning.tokenizer import open_clip_tokenizer_json

GOLDEN = Path(__file__).parents[1] / "golden" / "tokens.json"
CASES = json.loads(GOLDEN.read_text("utf-8"))["cases"]
START, END = "<|startoftext|>", "<|endoftext|>"

# A vocabulary of 517 tokens: 256 symbols, the same at the end of a word, "at</w>" 512, "cat</w>" 513, "hi</w>" 514.
MERGES = [("a", "t</w>"), ("c", "at</w>"), ("h", "i</w>")]


def tiny_model():
    """Vocabulary and merges of the tiny tokenizer, with the special tokens as transformers calls them."""
    model = json.loads(open_clip_tokenizer_json(MERGES))["model"]
    names = {"<start_of_text>": START, "<end_of_text>": END}
    return {names.get(token, token): index for token, index in model["vocab"].items()}, list(map(list, MERGES))


def write_files(folder, files):
    """files: contents by name; what is not text is written as JSON, None leaves the file out."""
    for name, content in files.items():
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_bytes(text.encode())
    return folder


def old_files(**others):
    """What transformers 4 and earlier write: the vocabulary and the merges apart."""
    vocabulary, merges = tiny_model()
    text = "#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n"
    return {"vocab.json": vocabulary, "merges.txt": text} | {f"{name}.json": value for name, value in others.items()}


def new_files(added=(), **others):
    """What transformers 5 writes: one tokenizer.json."""
    vocabulary, merges = tiny_model()
    whole = {"added_tokens": list(added), "model": {"type": "BPE", "vocab": vocabulary, "merges": merges}}
    return {"tokenizer.json": whole} | {f"{name}.json": value for name, value in others.items()}


def token(content, **flags):
    """A token with its flags, as the files write it."""
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False} | flags


BANG = {"pad_token": "!"}
LISTED = {"0": token("!", special=True), "515": token(START, special=True), "516": token(END, special=True)}
CAT, DOG = (token(content, special=False, normalized=True) for content in ("<cat>", "<dog>"))
# Folders as one finds them -> the ids of "HI! <cat> <CAT>" between start (515) and end (516), and the padding.
SPELLED = [283, 513, 285]  # "<</w>", "cat</w>", "></w>"
PLAIN, PADDED = ([514, 256, *SPELLED, *SPELLED], 516), ([514, 0, *SPELLED, *SPELLED], 0)
ADDED, SPECIAL = ([514, 0, 517, 517], 0), ([514, 0, 517, *SPELLED], 0)
FOLDERS = {
    "nothing said": (old_files(), PLAIN),
    "map": (old_files(special_tokens_map=BANG), PADDED),
    "map of objects": (old_files(special_tokens_map={"pad_token": token("!")}), PADDED),
    "config": (old_files(tokenizer_config=BANG), PADDED),
    "the map wins": (old_files(special_tokens_map=BANG, tokenizer_config={"pad_token": END}), PADDED),
    "the listing wins": (
        old_files(special_tokens_map=BANG, tokenizer_config={"added_tokens_decoder": LISTED, "pad_token": END}),
        (PADDED[0], 516),
    ),
    "listed": (old_files(tokenizer_config={"added_tokens_decoder": {"517": CAT, **LISTED}} | BANG), ADDED),
    "listed, a gap": (old_files(tokenizer_config={"added_tokens_decoder": {"600": DOG, "517": CAT}} | BANG), ADDED),
    "added": (old_files(special_tokens_map=BANG, added_tokens={"<dog>": 600, "<cat>": 517}), ADDED),
    "added, the end too": (old_files(added_tokens={START: 515, END: 516}), PLAIN),
    "extra": (old_files(tokenizer_config=BANG | {"additional_special_tokens": ["<cat>"]}), SPECIAL),
    "extra, added": (
        old_files(tokenizer_config=BANG | {"additional_special_tokens": ["<cat>"]}, added_tokens={"<cat>": 517}),
        SPECIAL,
    ),
    "extra by name": (old_files(tokenizer_config=BANG | {"extra_special_tokens": {"animal_token": "<cat>"}}), SPECIAL),
    "named before extra": (
        old_files(tokenizer_config=BANG | {"mask_token": "<cat>", "extra_special_tokens": ["<dog>"]}),
        SPECIAL,
    ),
    "new": (new_files(tokenizer_config=BANG), PADDED),
    "new, added": (new_files([{"id": 0, **LISTED["0"]}, {"id": 517, **CAT}], tokenizer_config=BANG), ADDED),
    "no version": (old_files() | {"merges.txt": "\n".join(map(" ".join, MERGES))}, PLAIN),
    "Windows line ends": (old_files() | {"merges.txt": "\r\n".join(map(" ".join, MERGES)) + "\r\n"}, PLAIN),
}
