"""Networks that look at pictures, over all devices: what the metrics are computed of."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from unclip_jax.checkpoints.checkpoint import Checkpoint
from unclip_jax.checkpoints.config import ClipConfig, PriorCheckpointConfig
from unclip_jax.checkpoints.loading import load_networks
from unclip_jax.checkpoints.networks import Network, abstract_network
from unclip_jax.conditioning.clip_image import Preprocess, preprocess
from unclip_jax.conditioning.tokenizer import Tokenizer
from unclip_jax.distributed.mesh import batch_sharding, data_size, pad_batch, replicated
from unclip_jax.models.clip import TextEncoder, VisionEncoder

Images = Sequence[NDArray[np.uint8]]


def over_devices(function: Callable[[Any, jax.Array], jax.Array], params: Any, mesh: Mesh, batch_size: int) -> Any:
    """A function of a batch as one of any number of rows: (N, ...) -> (N, ...), in batches over the devices."""
    compiled = jax.jit(function)
    params = jax.device_put(params, replicated(mesh))
    size = -(-batch_size // data_size(mesh)) * data_size(mesh)

    def run(rows: NDArray[Any]) -> NDArray[Any]:
        parts = []
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            made = compiled(params, jax.device_put(pad_batch(part, size), batch_sharding(mesh)))
            parts.append(np.asarray(made)[: len(part)])
        return np.concatenate(parts)

    return run


@dataclasses.dataclass(frozen=True)
class ClipFeatures:
    """A CLIP model's two towers: pictures and texts -> embeddings (N, D), un-normalised."""

    pictures: Callable[[Images], NDArray[np.float32]]
    texts: Callable[[Sequence[str]], NDArray[np.float32]]


def clip_features(checkpoint: Checkpoint, mesh: Mesh, batch_size: int = 32) -> ClipFeatures:
    """The towers of an open checkpoint: a CLIP model, or one of the family whose towers have their projections.

    Raises ValueError for a checkpoint without an image encoder, or whose text tower has no projection.
    """
    config = checkpoint.config
    if (
        isinstance(config, PriorCheckpointConfig)
        or config.image_encoder is None
        or config.text_encoder.projection_dim is None
    ):
        raise ValueError(f"{checkpoint.source}: no CLIP model with both its towers and their projections")
    networks = {
        "image_encoder": abstract_network(VisionEncoder, config.image_encoder),
        "text_encoder": abstract_network(TextEncoder, config.text_encoder),
    }
    loaded = load_networks(checkpoint, networks, mesh)
    vision, text = loaded["image_encoder"], loaded["text_encoder"]
    mode: Preprocess = "diffusers" if isinstance(config, ClipConfig) else config.preprocess
    size, tokenizer = config.image_encoder.image_size, checkpoint.tokenizer
    see = over_devices(lambda params, x: vision.merge(params)(x), vision.params, mesh, batch_size)
    read = over_devices(lambda params, tokens: text.merge(params).embed(tokens), text.params, mesh, batch_size)
    return ClipFeatures(
        lambda pictures: see(np.stack([preprocess(picture, mode, size) for picture in pictures])),
        lambda texts: read(_tokens(tokenizer, texts)),
    )


def embed_texts(
    checkpoint: Checkpoint, texts: Sequence[str], mesh: Mesh, *, normalize: bool = False
) -> NDArray[np.float32]:
    """Texts in the joint space of an open CLIP checkpoint, whose text tower alone is read: (texts, D) float32.

    The pictures' counterpart is an unCLIP pipeline's `encode_image_embeds`, if its image encoder is of the same CLIP
    model: OpenCLIP's ViT-H/14 (laion2b_s32b_b79k) for Stable Diffusion's unCLIP H, OpenAI's ViT-L/14 for L. A text's
    embedding does not depend on its company. normalize: to length 1.

    Raises ValueError for a text tower without its projection, as Stable Diffusion checkpoints have it, no texts, and
    tokens outside the tower's vocabulary.
    """
    config = checkpoint.config.text_encoder
    if config.projection_dim is None:
        raise ValueError(
            f"{checkpoint.source}: its text encoder has no projection into the joint space; open the CLIP model itself"
        )
    if isinstance(texts, str) or not len(texts):
        raise ValueError(f"texts is {texts!r}; want a list of at least one string")
    tokens = checkpoint.tokenizer(list(texts))
    if tokens.max() >= config.vocab_size:
        raise ValueError(f"texts: token id {tokens.max()} is outside the text encoder's {config.vocab_size}")
    abstract = abstract_network(TextEncoder, config)
    text = load_networks(checkpoint, {"text_encoder": abstract}, mesh, progress=False)["text_encoder"]
    read = over_devices(lambda params, rows: text.merge(params).embed(rows), text.params, mesh, batch_size=1)
    embeds: NDArray[np.float32] = read(tokens)
    return embeds / np.linalg.norm(embeds, axis=-1, keepdims=True) if normalize else embeds


def _tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> NDArray[np.int32]:
    return tokenizer(list(texts))


def inception_features(network: Network, mesh: Mesh, batch_size: int = 32) -> Callable[[Images], NDArray[np.float32]]:
    """Pictures of one size -> Inception's features (N, 2048), as FID wants them.

    network: from `convert.inception.open_inception`.
    """
    run = over_devices(
        lambda params, x: network.merge(params)(x.astype(jnp.float32) / 255), network.params, mesh, batch_size
    )
    return lambda pictures: run(np.stack(list(pictures)))
