"""Textual inversion embeddings: in their own files (diffusers, AUTOMATIC1111, the original), or bundled with a LoRA."""

import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.adapters.changes import FAMILIES
from convert.adapters.sources import WORD_FILES, as_array, find_file
from convert.kinds import WORD, other_than
from convert.readers import CheckpointError, TensorFile, load_pickle, open_tensors, recognise
from convert.tensor_file import naming, quoted
from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.checkpoints.nonfinite import warn_unless_finite

LONGEST_WORD = 200
# What tools call the vectors where they do not say the word; ComfyUI and OneTrainer say the text encoder.
NAMELESS = ("*", "emb_params", "clip_l", "clip_h", "clip_g")
BUNDLED = re.compile(r"bundle_emb\.(.+?)\.(string_to_param\..+|emb_params|clip_[lh]|\*)", re.DOTALL)
EMBED = "<embed>"  # cloneofsimo's mark of a word, in the metadata


def read_textual_inversion(
    source: str | os.PathLike[str] | Mapping[str, Any],
    config: CheckpointConfig,
    token: str | None = None,
    weight_name: str | None = None,
) -> dict[str, np.ndarray]:
    """Reads textual inversion embeddings of diffusers (`learned_embeds`), AUTOMATIC1111 or the original.

    Args:
        source: A `.safetensors` or torch file; a folder or the hub id of a repository with diffusers' file, or with one
            called `weight_name`; or a state dict of arrays.
        config: The checkpoint's configuration.
        token: The word to use; None for the file's own word, or the file's stem if it has none (`emb_params`, a bare
            tensor).
        weight_name: The file's name in a folder or repository.

    Returns:
        {word: rows (n, width)}.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is damaged, hostile, or for another base model, whose text encoder has another width.
        OSError: As in `unclip_jax.checkpoints.hub.download`, with the same subclasses.
    """
    if not isinstance(source, str | os.PathLike):
        with naming("the state dict"):
            return _checked(_words(source, None), config, token)
    path = find_file(source, WORD_FILES, weight_name)
    with naming(path):
        if recognise(path) == "safetensors":
            with open_tensors(path) as file:
                if kind := other_than(WORD, file.tensors):
                    raise CheckpointError(kind)
                return _checked(_words({key: file.read(key) for key in file.tensors}, path.stem), config, token)
        return _checked(_words(load_pickle(path), path.stem), config, token)


def bundled_words(file: TensorFile, config: CheckpointConfig) -> tuple[dict[str, np.ndarray], set[str]]:
    """The embeddings in a LoRA file of kohya, OneTrainer or cloneofsimo, and the names of their tensors."""
    keys: dict[str, str] = {}
    for key in file.tensors:
        match = BUNDLED.fullmatch(key)
        word = match[1] if match else key if file.metadata.get(key) == EMBED else None
        if word is not None:
            if word in keys:
                raise CheckpointError(f"{quoted(key)}: the word is there twice, as {quoted(keys[word])} too")
            keys[word] = key
    words = {word: _rows(word, file.read(key), config) for word, key in keys.items()}
    return words, set(keys.values())


def _words(content: Any, stem: str | None) -> dict[Any, np.ndarray]:
    """The words in a file's content and their vectors as they are; `stem` for the one without a name."""
    if isinstance(content, dict) and isinstance(params := content.get("string_to_param"), dict) and params:
        # One word is called by its name, or by its place in the original's dict; several by their places.
        named = content.get("name") if len(params) == 1 else None
        found = {named if named is not None else key: value for key, value in params.items()}
    elif isinstance(content, Mapping) and len(content) == 1:
        found = dict(content)
    elif isinstance(content, Mapping) and {"clip_l", "clip_g"} & content.keys():
        raise CheckpointError("is a word for two text encoders (clip_l, clip_g): of another base model")
    elif isinstance(content, Mapping):
        raise CheckpointError(
            "is not a textual inversion: want one tensor by its word, or AUTOMATIC1111's string_to_param"
        )
    else:
        found = {"*": content}
    words = {}
    for name, vectors in found.items():
        if not hasattr(vectors, "__array__"):
            raise CheckpointError("is not a textual inversion: the vectors are not a tensor")
        words[stem if name in NAMELESS else name] = as_array(str(name), vectors)
    return words


def _checked(words: Mapping[Any, np.ndarray], config: CheckpointConfig, token: str | None) -> dict[str, np.ndarray]:
    if token is not None:
        if len(words) > 1:
            raise CheckpointError(f"holds {len(words)} words, which token= cannot name: leave it out")
        words = dict.fromkeys([token], *words.values())
    return {word: _rows(word, rows, config) for word, rows in words.items()}


def _rows(word: Any, rows: np.ndarray, config: CheckpointConfig) -> np.ndarray:
    """A word's vectors, checked with the word itself: (n, width), in the dtype they have."""
    if not isinstance(word, str) or not word or len(word) > LONGEST_WORD or re.search(r"\s", word):
        shown = quoted(word) if isinstance(word, str) else f"a {type(word).__name__}"
        shown = "nowhere said" if word is None else shown
        raise CheckpointError(f"its word is {shown}; want one without white space: give another (token=)")
    width = config.text_encoder.width
    if rows.dtype.kind not in "fV":
        raise CheckpointError(f"{quoted(word)} has dtype {rows.dtype}, want a floating one")
    if rows.ndim not in (1, 2) or not rows.size or rows.shape[-1] != width:
        family = f", as {FAMILIES[rows.shape[-1]]} has it" if rows.shape[-1:] in ((n,) for n in FAMILIES) else ""
        raise CheckpointError(
            f"{quoted(word)} has shape {rows.shape}, want (vectors, {width}): of another base model{family}"
        )
    return warn_unless_finite(word, np.array(rows, order="C").reshape(-1, width))
