"""Learnt words in the file that diffusers and other tools read: `learned_embeds.safetensors`, {placeholder: rows}."""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from unclip_jax.checkpoints.atomic import replaced_file

FILE = "learned_embeds.safetensors"


def save_textual_inversion(placeholder: str, rows: np.ndarray, folder: Path) -> Path:
    """Writes rows (n, width) of a placeholder into a folder, for `load_textual_inversion`; returns the file's path."""
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as partial:
        save_file({placeholder: np.ascontiguousarray(rows, np.float32)}, partial, {"format": "pt"})
    return path
