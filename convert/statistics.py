"""The mean and standard deviation of CLIP image embeddings, by which unCLIP normalises them before noising."""

import io
import zipfile
from pathlib import Path

import numpy as np

from convert.readers import CheckpointError, load_pickle, open_tensors
from convert.tensor_file import quoted
from convert.weights import weights_file
from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.checkpoints.hub import download

MAX_FEATURES = 1 << 16
# Where the statistics of OpenAI's ViT-L/14 are published: those of Karlo, by which unCLIP's smaller model was trained.
PUBLISHED, PUBLISHED_PART, PUBLISHED_WIDTH = "sd2-community/stable-diffusion-2-1-unclip-small", "image_normalizer", 768
STATISTICS = ("image_normalizer.mean", "image_normalizer.std")


def read_statistics(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads the mean and standard deviation of CLIP image embeddings.

    Args:
        path: A torch file with a pair (Karlo's `ViT-L-14_stats.th`), an `.npz` with "mean" and "std", a diffusers
            folder or its image_normalizer folder, or that folder's weights.

    Returns:
        Two (D,) float32 arrays.

    Raises:
        FileNotFoundError: There is nothing there.
        CheckpointError: The file is something else.
    """
    if path.is_dir():
        inner = path / "image_normalizer"
        path = weights_file(inner if inner.is_dir() else path, None)
    if path.suffix == ".npz":
        pair = _npz_pair(path)
    elif path.suffix in (".safetensors", ".bin", ".json"):
        with open_tensors(path) as file:
            if not {"mean", "std"} <= file.tensors.keys():
                names = ", ".join(map(quoted, list(file.tensors)[:5]))
                raise CheckpointError(f"{path.name}: want tensors 'mean' and 'std', found {names}")
            pair = [file.read(name) for name in ("mean", "std")]
    else:
        content = load_pickle(path)
        pair = list(content) if isinstance(content, tuple | list) else [content]
    if len(pair) != 2 or not all(isinstance(a, np.ndarray) and _is_floating(a.dtype) for a in pair):
        raise CheckpointError(f"{path.name}: want a pair of floating arrays, mean and standard deviation")
    if max(a.size for a in pair) > MAX_FEATURES:
        raise CheckpointError(f"{path.name}: {max(a.size for a in pair)} features; accepted: up to {MAX_FEATURES}")
    with np.errstate(over="ignore"):
        mean, std = (np.array(a, np.float32).reshape(-1) for a in pair)
    if mean.shape != std.shape or not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
        raise CheckpointError(f"{path.name}: mean {mean.shape} and std {std.shape}: want finite arrays alike, std > 0")
    return mean, std


def published_statistics(width: int, owner: str) -> Path:
    """The file of the published statistics of OpenAI's ViT-L/14, downloaded from the hub or found in its cache.

    Args:
        width: Of the embeddings.
        owner: What needs them, for messages.

    Returns:
        The file's path.

    Raises:
        CheckpointError: The width is another, or the file cannot be downloaded. The message says which file would do
            and where it is.
    """
    reason = f"none are published for width {width}"
    try:
        if width == PUBLISHED_WIDTH:
            return weights_file(download(PUBLISHED, PUBLISHED_PART), None)
    except (OSError, ValueError) as error:
        reason = f"they cannot be fetched: {error}"
    raise CheckpointError(
        f"{owner}, whose embedding statistics are kept outside the checkpoint, and {reason}. Give as clip_stats= "
        f"the folder https://huggingface.co/{PUBLISHED}/tree/main/{PUBLISHED_PART}, Karlo's "
        "ViT-L-14_stats.th, or an .npz of mean and std"
    )


def embedding_statistics(config: CheckpointConfig, clip_stats: Path | None) -> dict[str, np.ndarray]:
    """The normaliser's parameters for an original file: none without an image encoder, 0 and 1 without `clip_stats`.

    Raises:
        CheckpointError: The statistics have another size.
    """
    if config.image_encoder is None:
        return {}
    width = config.image_encoder.projection_dim
    if clip_stats is not None:
        mean, std = read_statistics(clip_stats)
        if mean.shape != (width,):
            raise CheckpointError(f"{clip_stats.name}: {len(mean)} features; the image encoder gives {width}")
    else:
        mean, std = np.zeros(width, np.float32), np.ones(width, np.float32)
    return dict(zip(STATISTICS, (mean, std), strict=True))


def _is_floating(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype.name == "bfloat16"


def _npz_pair(path: Path) -> list[np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"clip_stats: no such file: {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            members = [archive.getinfo(f"{name}.npy") for name in ("mean", "std")]
            # A member never unpacks to more than it claims.
            if max(member.file_size for member in members) > 8 * MAX_FEATURES:
                raise ValueError(f"accepted: up to {MAX_FEATURES} features")
            return [np.load(io.BytesIO(archive.read(member)), allow_pickle=False) for member in members]
    except Exception as error:  # zipfile and numpy raise whatever went wrong inside
        raise CheckpointError(
            f"{path.name}: want an .npz of arrays 'mean' and 'std' ({' '.join(str(error).split()):.200})"
        ) from error
