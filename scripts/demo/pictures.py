"""Images and captions of the demo model's training, from the drawings that scripts/demo/drawings collects."""

import colorsys
import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from PIL import Image

from convert.tokenizer import NAMED_TOKENS, WORDS, tokenizer_json_from_folder
from unclip_jax.conditioning import tokenizer as clip_tokenizer

SIZE = 64
WHITE_SHARE = 0.75
# Their words can be asked for in a prompt: "..., blue background".
BACKGROUNDS = {
    "red": (214, 57, 57),
    "orange": (242, 150, 60),
    "yellow": (248, 222, 96),
    "green": (92, 176, 92),
    "light blue": (156, 208, 240),
    "blue": (60, 110, 206),
    "purple": (142, 86, 184),
    "pink": (244, 168, 196),
    "brown": (136, 96, 66),
    "gray": (150, 150, 150),
    "black": (24, 24, 24),
}
WHITE = (255, 255, 255)


class Drawings(NamedTuple):
    """The arrays that scripts/demo/drawings writes, see there."""

    images: np.ndarray
    alpha: np.ndarray
    concept: np.ndarray
    style: np.ndarray
    names: np.ndarray
    words: np.ndarray
    held_out_concept: np.ndarray
    held_out: np.ndarray


def load_drawings(path: Path) -> Drawings:
    with np.load(path, allow_pickle=False) as arrays:
        return Drawings(**{name: arrays[name] for name in Drawings._fields})


def plain(drawings: Drawings, index: int, background: tuple[int, int, int] = WHITE) -> np.ndarray:
    """The drawing as it is, on a colour: (64, 64, 3) uint8."""
    rest = 1 - drawings.alpha[index, ..., None] / np.float32(255)
    return np.rint(drawings.images[index] + rest * np.asarray(background, np.float32)).clip(0, 255).astype(np.uint8)


def augmented(
    drawings: Drawings, index: int, rng: np.random.Generator, white_share: float = WHITE_SHARE
) -> tuple[np.ndarray, str]:
    """The drawing a little smaller, moved, mirrored, of other hues, on a colour: (64, 64, 3) uint8, and the colour's
    name, "" for white."""
    layers = np.concatenate([drawings.images[index], drawings.alpha[index, ..., None]], -1)
    if rng.random() < 0.5:
        layers = layers[:, ::-1]
    size = int(rng.integers(50, SIZE + 1))
    # Premultiplied, so that each channel can be resampled by itself.
    small = np.stack(
        [
            np.asarray(Image.fromarray(c).resize((size, size), Image.Resampling.BICUBIC))
            for c in np.moveaxis(layers, -1, 0)
        ],
        -1,
    ).astype(np.float32)
    left, top = rng.integers(0, SIZE - size + 1, 2)
    placed = np.zeros((SIZE, SIZE, 4), np.float32)
    placed[top : top + size, left : left + size] = small
    color, alpha = placed[..., :3], placed[..., 3:]
    if rng.random() < 0.2:
        color = np.clip(color @ _hue_rotation(rng.uniform(-0.12, 0.12)).T, 0, alpha)
    name, background = "", np.asarray(WHITE, np.float32)
    if rng.random() >= white_share:
        name = str(rng.choice(list(BACKGROUNDS)))
        background = np.asarray(BACKGROUNDS[name], np.float32) + rng.uniform(-10, 10, 3).astype(np.float32)
    picture = color + (1 - alpha / 255) * background
    return np.rint(picture).clip(0, 255).astype(np.uint8), name


def _hue_rotation(turns: float) -> np.ndarray:
    """RGB -> RGB with the chrominance turned, luma kept: (3, 3)."""
    to_yiq = np.array([colorsys.rgb_to_yiq(*row) for row in np.eye(3)]).T
    cos, sin = np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)
    turn = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    return (np.linalg.inv(to_yiq) @ turn @ to_yiq).astype(np.float32)


def caption(drawings: Drawings, index: int, background: str, rng: np.random.Generator) -> str:
    """What the drawing shows, sometimes with a search word more, and the background's colour where it has one."""
    concept = drawings.concept[index]
    parts = [str(drawings.names[concept])]
    words = str(drawings.words[concept]).split()
    if words and rng.random() < 0.3:
        parts.append(str(rng.choice(words)))
    if background:
        parts.append(f"{background} background")
    return ", ".join(parts)


def tokenizer_json(drawings: Drawings, size: int) -> str:
    """A byte-pair vocabulary of `size` ids for the captions, as CLIP's is made: bytes, merges, start and end."""
    captions = [*drawings.names, *drawings.words, *(f"{name} background" for name in BACKGROUNDS)]
    start, end = NAMED_TOKENS["bos_token"], NAMED_TOKENS["eos_token"]
    learner = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = tokenizers.normalizers.Lowercase()
    learner.pre_tokenizer = clip_tokenizer.words(WORDS, split_again=True)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator(map(str, captions), trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    merges = merges[: size - 2 * len(alphabet) - 2]
    tokens = [*alphabet, *(f"{symbol}</w>" for symbol in alphabet), *(a + b for a, b in merges), start, end]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = {token: index for index, token in enumerate(tokens)}
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
        Path(folder, "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]), "utf-8")
        return tokenizer_json_from_folder(Path(folder))
