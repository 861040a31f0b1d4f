"""Texts in CLIP's joint space. Live comparisons of the tower: tests/convert/test_clip_parity.py."""

import jax
import numpy as np
import pytest

from unclip_jax.checkpoints.source import open_checkpoint
from unclip_jax.distributed.mesh import local_mesh
from unclip_jax.evaluation.features import clip_features, embed_texts

TEXTS = ["a photo of a dog", "a cat", ""]


def test_texts_alone_are_the_texts_of_both_towers(small_clip):
    mesh = local_mesh(jax.local_devices()[:1])
    with open_checkpoint(small_clip) as checkpoint:
        embeds = embed_texts(checkpoint, TEXTS, mesh)
        assert embeds.shape == (3, checkpoint.config.text_encoder.projection_dim)
        np.testing.assert_allclose(embeds, clip_features(checkpoint, mesh, 3).texts(TEXTS), rtol=1e-4, atol=1e-5)
        alone = embed_texts(checkpoint, TEXTS[1:2], mesh, normalize=True)[0]
        np.testing.assert_allclose(alone, embeds[1] / np.linalg.norm(embeds[1]), rtol=1e-6)
        with pytest.raises(ValueError, match="want a list of at least one string"):
            embed_texts(checkpoint, "a photo of a dog", mesh)


def test_a_text_encoder_without_its_projection(golden_files):
    file, options = golden_files("unclip_h")
    with open_checkpoint(file, **options) as checkpoint, pytest.raises(ValueError, match="open the CLIP model itself"):
        embed_texts(checkpoint, TEXTS, local_mesh())
