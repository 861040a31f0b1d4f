"""Writes textual inversion embeddings: diffusers' {word: rows}, and AUTOMATIC1111's files, named by the word."""

from pathlib import Path
from typing import Literal, get_args

import numpy as np
from safetensors.numpy import save_file

from convert.adapters import WORD_FILES
from unclip_jax.checkpoints.atomic import replaced_file

FILE = WORD_FILES[0]
Form = Literal["diffusers", "a1111"]


def save_textual_inversion(word: str, rows: np.ndarray, path: Path | str, form: Form = "diffusers") -> Path:
    """Writes a textual inversion embedding in its own dtype, for `load_textual_inversion`.

    Args:
        word: The word.
        rows: (n, width).
        path: A `.safetensors` file; or a folder, in which it is `learned_embeds.safetensors`, or WORD.safetensors for
            form "a1111", whose files give their word only by their name.
        form: "diffusers" or "a1111".

    Returns:
        The file's path.

    Raises:
        ValueError: The form is unknown, or the word cannot be the name of a file.
    """
    if form not in get_args(Form):
        raise ValueError(f"form is {form!r}; accepted: {', '.join(get_args(Form))}")
    path = Path(path)
    if form == "a1111" and (path.stem != word if path.suffix == ".safetensors" else not word.strip(".") or "/" in word):
        raise ValueError(f"word {word!r}: in AUTOMATIC1111's form the file's name is the word, and {path} cannot be")
    if path.suffix != ".safetensors":
        path /= FILE if form == "diffusers" else f"{word}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as partial:
        tensors = {word if form == "diffusers" else "emb_params": np.ascontiguousarray(rows)}
        save_file(tensors, partial, {"format": "pt"})
    return path
