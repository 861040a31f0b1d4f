"""The optional check of finished images by CLIP, as in diffusers' StableDiffusionSafetyChecker.

An image is flagged if its embedding is near enough to one of 17 concepts, each with a threshold of its own. For an
image near one of three further concepts, all scores count a little more. The published concepts are embeddings without
their words, of sexual content only, as far as could be found out (Rando et al. 2022, arXiv:2210.04610).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from unclip_jax.checkpoints.networks import Network
from unclip_jax.conditioning.clip_image import preprocess

CONCEPTS = 17
SPECIAL_CARE = 3
ADJUSTMENT = 0.01  # what is added to the scores of an image that is near a concept of special care
DECIMALS = 3  # scores are rounded before they are compared with 0


@dataclasses.dataclass(frozen=True)
class Concepts:
    """Directions in CLIP's space, with thresholds of their cosines: embeds (K, D) and thresholds (K,), float32."""

    embeds: NDArray[np.float32]
    thresholds: NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class SafetyChecker:
    """What `convert.safety.open_safety_checker` reads: an image tower, the side of its images, and the concepts."""

    image_encoder: Network
    image_size: int
    concepts: Concepts
    special_care: Concepts


def check(checker: SafetyChecker, images: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> list[bool]:
    """Checks whether images are flagged.

    Images go through the network one by one, so that no verdict depends on the rest of a batch.

    Args:
        checker: The safety checker.
        images: uint8 (H, W, 3) each.

    Returns:
        One verdict per image.

    Raises:
        ValueError: As in `unclip_jax.conditioning.clip_image.preprocess`.
        FloatingPointError: A score is NaN, which would otherwise pass as harmless.
    """
    return [is_flagged(checker, embed(checker, image)) for image in images]


def black_out(images: NDArray[np.uint8], flags: Sequence[bool]) -> NDArray[np.uint8]:
    """The images (B, H, W, 3) with flagged ones replaced by black, which is what diffusers returns."""
    if len(images) != len(flags):
        raise ValueError(f"flags has {len(flags)} entries for {len(images)} images; want one per image")
    return np.where(np.asarray(flags, bool)[:, None, None, None], images.dtype.type(0), images)


def embed(checker: SafetyChecker, image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The embedding (D,) of one image, un-normalised."""
    pixels = preprocess(image, "diffusers", checker.image_size)
    encoder = checker.image_encoder
    return np.asarray(_encode(encoder.graphdef, encoder.params, pixels[None])[0], np.float32)


def is_flagged(checker: SafetyChecker, embedding: NDArray[np.float32]) -> bool:
    """The verdict on an embedding (D,)."""
    care = scores(checker.special_care, embedding, 0)
    return bool((scores(checker.concepts, embedding, ADJUSTMENT if (care > 0).any() else 0) > 0).any())


def scores(concepts: Concepts, embedding: NDArray[np.float32], adjustment: float) -> NDArray[np.float32]:
    """By how much an embedding's cosine with each concept exceeds its threshold: (K,), rounded, in float32."""
    above = _unit(concepts.embeds) @ _unit(embedding) - concepts.thresholds + np.float32(adjustment)
    if not np.isfinite(above).all():
        raise FloatingPointError("the safety checker's scores are not finite: its weights are broken")
    return np.round(above, DECIMALS)


def _unit(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.float32(1e-12))


@jax.jit(static_argnums=0)
def _encode(graphdef: Any, params: dict[str, jax.Array], pixels: jax.Array) -> jax.Array:
    return Network(graphdef, params).merge()(pixels)
