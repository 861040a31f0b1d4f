"""The networks whose features the metrics compare, run over all devices."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from unclip_jax.checkpoints.checkpoint import Checkpoint
from unclip_jax.checkpoints.config import BareConfig, ClipConfig, PriorCheckpointConfig
from unclip_jax.checkpoints.loading import load_networks
from unclip_jax.checkpoints.networks import Network, abstract_network
from unclip_jax.conditioning.clip_image import Preprocess, preprocess
from unclip_jax.conditioning.tokenizer import Tokenizer
from unclip_jax.distributed.mesh import batch_sharding, data_size, pad_batch, replicated
from unclip_jax.models.clip import TextEncoder, VisionEncoder

Images = Sequence[NDArray[np.uint8]]


def over_devices(function: Callable[[Any, jax.Array], jax.Array], params: Any, mesh: Mesh, batch_size: int) -> Any:
    """Turns a function of a batch into one of any number of rows: (N, ...) -> (N, ...), in batches over the devices."""
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
    """The two towers of a CLIP model: images and texts -> embeddings (N, D), un-normalised."""

    images: Callable[[Images], NDArray[np.float32]]
    texts: Callable[[Sequence[str]], NDArray[np.float32]]


def clip_features(checkpoint: Checkpoint, mesh: Mesh, batch_size: int = 32) -> ClipFeatures:
    """The towers of an open CLIP model, or of a checkpoint of the family whose towers have their projections.

    Args:
        checkpoint: The open checkpoint.
        mesh: The devices.
        batch_size: Images or texts at a time.

    Returns:
        The towers as functions.

    Raises:
        ValueError: The checkpoint has no image encoder, or its text tower no projection.
    """
    config = checkpoint.config
    if (
        isinstance(config, PriorCheckpointConfig | BareConfig)
        or config.image_encoder is None
        or config.text_encoder.projection_dim is None
    ):
        raise ValueError(f"{checkpoint.source} is not a CLIP model with both towers and their projections")
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
        lambda images: see(np.stack([preprocess(image, mode, size) for image in images])),
        lambda texts: read(_tokens(tokenizer, texts)),
    )


def embed_texts(
    checkpoint: Checkpoint, texts: Sequence[str], mesh: Mesh, *, normalize: bool = False
) -> NDArray[np.float32]:
    """Embeds texts in the joint space of an open CLIP checkpoint, of which only the text tower is read.

    The counterpart for images is an unCLIP pipeline's `encode_image_embeds`, if its image encoder belongs to the same
    CLIP model: OpenCLIP's ViT-H/14 (laion2b_s32b_b79k) for Stable Diffusion's unCLIP H, OpenAI's ViT-L/14 for L. A
    text's embedding does not depend on the other texts.

    Args:
        checkpoint: The open checkpoint.
        texts: The texts.
        mesh: The devices.
        normalize: Scale the embeddings to length 1.

    Returns:
        (texts, D) float32.

    Raises:
        ValueError: The text tower has no projection (as in Stable Diffusion checkpoints), there are no texts, or a
            token is outside the tower's vocabulary.
    """
    config = None if isinstance(checkpoint.config, BareConfig) else checkpoint.config.text_encoder
    if config is None or config.projection_dim is None:
        raise ValueError(
            f"{checkpoint.source}: the text encoder has no projection into the joint space; open the CLIP model itself"
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
    """Inception's features of images of one size, as FID needs them.

    Args:
        network: From `convert.inception.open_inception`.
        mesh: The devices.
        batch_size: Images at a time.

    Returns:
        Images -> (N, 2048) float32.
    """
    run = over_devices(
        lambda params, x: network.merge(params)(x.astype(jnp.float32) / 255), network.params, mesh, batch_size
    )
    return lambda images: run(np.stack(list(images)))
