"""The files of a transformers CLIPTokenizer folder for one of our tokenizers."""

import json
from typing import Any

from unclip_jax.conditioning.tokenizer import Tokenizer

# open_clip's names of the two tokens that transformers knows by others.
OPEN_CLIP_TOKENS = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """File name -> text: the vocabulary in the form that every release of transformers reads.

    A tokenizer of the open_clip dialect becomes the one that Stability published for transformers: the same vocabulary,
    padded with id 0, "!". A "!" typed in a prompt is then a padding token, too.
    """
    data = json.loads(tokenizer.json)
    post, padding = data["post_processor"], data["padding"]
    rename = OPEN_CLIP_TOKENS if tokenizer.dialect == "open_clip" else {}
    vocabulary = {rename.get(token, token): index for token, index in data["model"]["vocab"].items()}
    merges = ["#version: 0.2", *(" ".join(pair) for pair in data["model"]["merges"])]
    added = {}
    for entry in data["added_tokens"]:
        content = rename.get(entry["content"], entry["content"])
        added[entry["id"]] = {**{key: entry[key] for key in entry if key != "id"}, "content": content}
    end = rename.get(post["sep"][0], post["sep"][0])
    named = {
        "bos_token": rename.get(post["cls"][0], post["cls"][0]),
        "eos_token": end,
        "unk_token": data["model"].get("unk_token") or end,
        "pad_token": padding["pad_token"],
    }
    if tokenizer.dialect == "open_clip":
        added[padding["pad_id"]] = _special(padding["pad_token"])
    config: dict[str, Any] = {
        "added_tokens_decoder": {str(index): added[index] for index in sorted(added)},
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": tokenizer.context_length,
        "tokenizer_class": "CLIPTokenizer",
        **named,
    }
    files = {
        "vocab.json": _json(vocabulary),
        "merges.txt": "\n".join(merges) + "\n",
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json(named),
    }
    beyond = {entry["content"]: index for index, entry in added.items() if entry["content"] not in vocabulary}
    return files | ({"added_tokens.json": _json(beyond)} if beyond else {})


def _special(content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": content, **flags, "special": True}


def _json(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False, indent=2) + "\n"
