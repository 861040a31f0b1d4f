"""Reads the tokenizer of a folder that transformers' CLIPTokenizer can open.

Special tokens follow transformers 5. They are those of tokenizer_config.json if that lists `added_tokens_decoder`.
Otherwise special_tokens_map.json takes precedence, and the tokens of added_tokens.json and tokenizer.json are added.
"""

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, normalizers

from convert.readers import CheckpointError
from unclip_jax.checkpoints.strict_json import read_bytes, read_object, where
from unclip_jax.conditioning.tokenizer import Tokenizer, byte_pairs, completed, words

WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"

# The tokens that a folder names, in the order in which transformers registers them, with CLIP's defaults.
NAMED_TOKENS = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "sep_token": None,
    "pad_token": "<|endoftext|>",
    "cls_token": None,
    "mask_token": None,
}
TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# What a folder could ask for beside its tokens; other values than these are refused.
SETTINGS = {"padding_side": "right", "truncation_side": "right", "split_special_tokens": False}


def open_tokenizer(folder: Path, context_length: int) -> Tokenizer:
    """The tokenizer of a folder, in dialect transformers.

    Raises:
        CheckpointError: The folder's files are broken.
    """
    try:
        return Tokenizer.from_json(tokenizer_json_from_folder(folder), "transformers", context_length)
    except (ValueError, FileNotFoundError) as error:
        raise CheckpointError(f"tokenizer: {error}") from error


def tokenizer_json_from_folder(folder: Path) -> str:
    """The tokenizer.json of a folder, for dialect transformers.

    Reads tokenizer.json or, without it, vocab.json and merges.txt.

    Raises:
        FileNotFoundError: There is no vocabulary.
        ValueError: A file is broken or needs something that is not supported. The message names it.
    """
    folder = Path(folder)
    vocabulary, merges, source = _read_vocabulary(folder)
    named, added = _read_special_tokens(folder)
    tokenizer = tokenizers.Tokenizer(byte_pairs(vocabulary, merges, named["unk_token"], source))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = words(WORDS, split_again=True)
    return completed(tokenizer, added, named["bos_token"], named["eos_token"], named["pad_token"])


def _read_vocabulary(folder: Path) -> tuple[Any, list[Any], str]:
    """Ids by token, pairs of tokens in order of rank, and the name of their source in messages."""
    whole, vocab, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
    if whole.exists():
        model = read_object(whole).get("model")
        model = model if isinstance(model, dict) else {"type": model}
        if (kind := model.get("type", "BPE")) != "BPE":
            raise ValueError(f"{where(whole)}: model is of type {_shown(kind)}; want BPE (byte pairs), as CLIP's is")
        if not isinstance(model.get("merges"), list):
            raise ValueError(f"{where(whole)}: merges is {_shown(model.get('merges'))}; want a list")
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]  # older files: "a b"
        return model.get("vocab"), list(map(tuple, pairs)), where(whole)
    if not (vocab.exists() and merges.exists()):
        raise FileNotFoundError(f"{folder}: holds neither tokenizer.json nor vocab.json with merges.txt")
    pairs = [line.split(" ") for line in _read_lines(merges) if line and not line.startswith("#version")]
    if bad := next((pair for pair in pairs if len(pair) != 2), None):
        raise ValueError(f"{where(merges)}: a line is {_shown(' '.join(bad))}; want two tokens")
    return read_object(vocab), list(map(tuple, pairs)), f"{where(vocab)} with {merges.name}"


def _read_lines(path: Path) -> list[str]:
    try:
        text = read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where(path)}: is not UTF-8 text ({error})") from error
    return text.replace("\r\n", "\n").replace("\r", "\n").rstrip().split("\n")


def _read_special_tokens(folder: Path) -> tuple[dict[str, str], list[AddedToken]]:
    """The text of each existing token of NAMED_TOKENS, and all tokens to register, in transformers' order."""
    config, overrides = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    settings = read_object(config) if config.exists() else {}
    for name, supported in SETTINGS.items():
        if settings.get(name, supported) != supported:
            raise ValueError(f"{where(config)}: {name} is {_shown(settings[name])}; want {supported!r}")
    listed = "added_tokens_decoder" in settings
    overriding = read_object(overrides) if overrides.exists() and not listed else {}

    named = {}
    for name, default in NAMED_TOKENS.items():
        path = overrides if name in overriding else config
        value = overriding.get(name, settings.get(name, default))
        if value is not None or default is not None:
            named[name] = _added_token(value, f"{where(path)}: {name}", special=True)
    extra = []
    for path, values in (config, settings), (overrides, overriding):
        given = values.get("extra_special_tokens") or values.get("additional_special_tokens") or []
        entries = given.values() if isinstance(given, dict) else given if isinstance(given, list) else [given]
        name = f"{where(path)}: one of additional_special_tokens"
        extra += [_added_token(value, name, special=True) for value in entries]

    if listed:
        added = _read_listed_tokens(settings["added_tokens_decoder"], f"{where(config)}: added_tokens_decoder")
    else:
        # Special are those that the files name, not those that nothing but the defaults name.
        special = {token.content for name, token in named.items() if name in settings or name in overriding}
        added = _read_unlisted_tokens(folder, special | {token.content for token in extra})
    known = {token.content for token in added}
    tokens = added + [token for token in (*named.values(), *extra) if token.content not in known]
    return {name: token.content for name, token in named.items()}, tokens


def _read_listed_tokens(entries: Any, name: str) -> list[AddedToken]:
    """The tokens of added_tokens_decoder by ascending id."""
    if not isinstance(entries, dict):
        raise ValueError(f"{name} is {_shown(entries)}; want an object of tokens by id")
    if (bad := next((index for index in entries if not index.isdecimal()), None)) is not None:
        raise ValueError(f"{name} has the id {_shown(bad)}; want a number")
    return [_added_token(entries[index], f"{name}: {index}") for index in sorted(entries, key=int)]


def _read_unlisted_tokens(folder: Path, special: set[str]) -> list[AddedToken]:
    """The tokens of added_tokens.json and of tokenizer.json by ascending id, if tokenizer_config.json lists none."""
    small, whole = folder / "added_tokens.json", folder / "tokenizer.json"
    ids = read_object(small) if small.exists() else {}
    entries = read_object(whole).get("added_tokens") or [] if whole.exists() else []
    for token, index in ids.items():
        if not isinstance(index, int):
            raise ValueError(f"{where(small)}: {_shown(token)} is {_shown(index)}; want its id, a number")
    if not (isinstance(entries, list) and all(isinstance(e, dict) and isinstance(e.get("id"), int) for e in entries)):
        raise ValueError(f"{where(whole)}: added_tokens is {_shown(entries)}; want a list of tokens with their ids")
    tokens = {index: AddedToken(content, special=content in special) for content, index in ids.items()}
    tokens |= {entry["id"]: _added_token(entry, f"{where(whole)}: one of added_tokens") for entry in entries}
    return [tokens[index] for index in sorted(tokens)]


def _added_token(value: Any, name: str, *, special: bool = False) -> AddedToken:
    """A token as the files write it: its text, which makes it special, or an object with its flags."""
    if isinstance(value, str):
        value, special = {"content": value}, True
    if not (isinstance(value, dict) and isinstance(value.get("content"), str) and value["content"]):
        raise ValueError(f"{name} is {_shown(value)}; want a token, its text or an object with its content")
    flags = {flag: bool(value[flag]) for flag in TOKEN_FLAGS if flag in value}
    return AddedToken(value["content"], **(flags | {"special": True} if special else flags))


def _shown(value: Any) -> str:
    """A value from a file, short enough for a message; for what may be deeply nested, only its type."""
    return f"a {type(value).__name__}" if isinstance(value, dict | list) else f"{value!r:.80}"
