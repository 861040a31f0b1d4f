"""PyTorch models with random weights, for the live comparisons (tests named *_parity.py; this module imports torch)."""

import torch

from convert.export.tokenizer import tokenizer_files
from unclip_jax.conditioning.tokenizer import Tokenizer, clip_tokenizer_json


def disturbed(model, seed=0, size=0.05):
    """The model with every parameter moved: none is 0 or 1 by its initialisation, so that every one matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def write_tokenizer(folder):
    """Stability's tokenizer, in transformers' files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in tokenizer_files(Tokenizer.from_json(clip_tokenizer_json(), "open_clip")).items():
        (folder / name).write_text(text, "utf-8")
    return folder
