"""Opens a foreign checkpoint - an original file or a diffusers folder - as our `Checkpoint`."""

import contextlib
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from convert import engine
from convert.architecture import diffusers as diffusers_architecture
from convert.architecture import original, presets
from convert.readers import CheckpointError, TensorFile, TensorInfo, load_pickle, open_tensors
from convert.rules import diffusers, ldm
from unclip_jax.checkpoints.checkpoint import Checkpoint, Parameter
from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.checkpoints.networks import abstract_params
from unclip_jax.conditioning.tokenizer import Tokenizer, clip_tokenizer_json, tokenizer_json_from_folder

STATISTICS = ("image_normalizer.mean", "image_normalizer.std")


def open_original(
    path: Path, *, config: Path | None = None, clip_stats: Path | None = None, ema: bool = False
) -> Checkpoint:
    """A `.ckpt`, `.pt`, `.pth`, `.bin` or `.safetensors` file in the original repository's layout.

    config: the original's yaml; left out, the file must hold a published checkpoint's tensors. clip_stats: the mean
    and standard deviation of the image embeddings, which the original keeps outside the checkpoint (`.th`, `.npz`);
    without it they are 0 and 1, right for ViT-H, and refused for the OpenAI encoder. ema: take the UNet's moving
    averages where the file has them.

    Raises CheckpointError in one line for anything that is not such a file or is incomplete.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_tensors(path))
        tensors: Mapping[str, TensorInfo] = file.tensors
        architecture = original.from_yaml(config, tensors) if config else presets.from_inventory(tensors, path.name)
        params = abstract_params(architecture)
        rules = ldm.table(architecture, params).rules
        statistics = _statistics(architecture, clip_stats)
        wanted = {name: spec for name, spec in params.items() if name not in STATISTICS}
        engine.require_complete(engine.check(rules, wanted, tensors, ldm.unused(architecture)), path.name)
        read = _ema_reader(file, path.name) if ema else file.read
        parameters = engine.import_params(rules, wanted, tensors, read)
        for name, array in statistics.items():
            parameters[name] = Parameter(array.shape, array.dtype, (_constant(array),))
        tokenizer = Tokenizer.from_json(
            clip_tokenizer_json(), "open_clip", context_length=architecture.text_encoder.context_length
        )
        files = tuple(p for p in (path, config, clip_stats) if p)
        return Checkpoint(architecture, tokenizer, parameters, str(path), files, stack.pop_all())


def open_diffusers(folder: Path, *, variant: str | None = None) -> Checkpoint:
    """A folder that diffusers saved (`save_pretrained`), with or without a variant such as "fp16".

    Raises CheckpointError in one line for a folder that is incomplete or of an architecture these networks are not.
    """
    with contextlib.ExitStack() as stack:
        architecture = diffusers_architecture.from_folder(folder)
        params = abstract_params(architecture)
        tensors: dict[str, TensorInfo] = {}
        readers: dict[str, Callable[[], np.ndarray]] = {}
        files = []
        components = sorted({name.split(".")[0] for name in params})
        paths = {component: weights_file(folder / component, variant) for component in components}
        if variant is not None and not any(f".{variant}" in path.name for path in paths.values()):
            raise CheckpointError(f"{folder.name}: no component has weights of variant {variant!r}")
        for component, path in paths.items():
            files.append(path)
            file = stack.enter_context(open_tensors(path))
            for name, info in file.tensors.items():
                ours = diffusers.canonical(f"{component}/{name}")
                if ours in tensors:
                    raise CheckpointError(f"{component}/{path.name}: {name} is there twice, in two dialects")
                tensors[ours] = info
                readers[ours] = _reader(file, name)
        rules = diffusers.table(architecture, params).rules
        report = engine.check(rules, params, tensors, diffusers.unused(architecture))
        engine.require_complete(report, folder.name)
        parameters = engine.import_params(rules, params, tensors, lambda name: readers[name]())
        try:
            text = tokenizer_json_from_folder(folder / "tokenizer")
            length = architecture.text_encoder.context_length
            tokenizer = Tokenizer.from_json(text, "transformers", context_length=length)
        except (ValueError, FileNotFoundError) as error:
            raise CheckpointError(f"tokenizer: {error}") from error
        return Checkpoint(architecture, tokenizer, parameters, str(folder), tuple(files), stack.pop_all())


def weights_file(folder: Path, variant: str | None) -> Path:
    """The weights of one component: safetensors before torch files, whole before sharded.

    A component without files of the variant falls back to its plain ones, as diffusers does. Raises CheckpointError,
    listing what the folder holds, when there are none.
    """
    if variant is not None and not variant.replace("-", "").replace("_", "").isalnum():
        raise CheckpointError(f"variant is {variant!r}; want a short name such as 'fp16'")
    stems = (
        ("diffusion_pytorch_model", "safetensors"),
        ("model", "safetensors"),
        ("diffusion_pytorch_model", "bin"),
        ("pytorch_model", "bin"),
    )
    for dotted in dict.fromkeys((f".{variant}" if variant else "", "")):
        for stem, suffix in stems:
            for name in (
                f"{stem}{dotted}.{suffix}",
                f"{stem}.{suffix}.index{dotted}.json",
                f"{stem}{dotted}.{suffix}.index.json",
            ):
                if (folder / name).is_file():
                    return folder / name
    found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    raise CheckpointError(
        f"{folder.name}: no weights{f' of variant {variant!r}' if variant else ''}; "
        f"the folder holds {', '.join(found[:8]) if found else 'nothing'}"
    )


def read_statistics(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The mean and standard deviation of CLIP image embeddings.

    path: a torch file of a pair (Karlo's `ViT-L-14_stats.th`), an `.npz` of "mean" and "std", a diffusers folder or
    its image_normalizer folder, or that folder's weights. Returns two (D,) float32 arrays. Raises CheckpointError in
    one line, FileNotFoundError when there is nothing there.
    """
    if path.is_dir():
        inner = path / "image_normalizer"
        path = weights_file(inner if inner.is_dir() else path, None)
    if path.suffix == ".npz":
        pair = _npz_pair(path)
    elif path.suffix in (".safetensors", ".bin", ".json"):
        with open_tensors(path) as file:
            if not {"mean", "std"} <= file.tensors.keys():
                raise CheckpointError(f"{path.name}: want tensors 'mean' and 'std', found {', '.join(file.tensors)}")
            pair = [np.array(file.read(name)) for name in ("mean", "std")]
    else:
        content = load_pickle(path)
        pair = list(content) if isinstance(content, tuple | list) else [content]
    if len(pair) != 2 or not all(isinstance(a, np.ndarray) and a.dtype.kind in "fV" for a in pair):
        raise CheckpointError(f"{path.name}: want a pair of floating arrays, mean and standard deviation")
    mean, std = (np.asarray(a, np.float32).reshape(-1) for a in pair)
    if mean.shape != std.shape or not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
        raise CheckpointError(f"{path.name}: mean {mean.shape} and std {std.shape}: want finite arrays alike, std > 0")
    return mean, std


def _npz_pair(path: Path) -> list[np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"clip_stats: no such file: {path}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return [arrays[name] for name in ("mean", "std")]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(f"{path.name}: want an .npz of arrays 'mean' and 'std' ({error})") from error


def _statistics(config: CheckpointConfig, clip_stats: Path | None) -> dict[str, np.ndarray]:
    if config.image_encoder is None:
        return {}
    width = config.image_encoder.projection_dim
    if clip_stats is not None:
        mean, std = read_statistics(clip_stats)
        if mean.shape != (width,):
            raise CheckpointError(f"{clip_stats.name}: {len(mean)} features; the image encoder gives {width}")
    elif config.image_encoder.activation == "quick_gelu":
        raise CheckpointError(
            "this checkpoint's image encoder is OpenAI's, whose embedding statistics are kept outside the checkpoint: "
            "give ViT-L-14_stats.th (it comes with Karlo), an .npz of mean and std, or a diffusers folder's "
            "image_normalizer weights as clip_stats (--clip-stats)"
        )
    else:
        mean, std = np.zeros(width, np.float32), np.ones(width, np.float32)
    return dict(zip(STATISTICS, (mean, std), strict=True))


def _ema_reader(file: TensorFile, where: str) -> Callable[[str], np.ndarray]:
    """Reads the UNet's moving averages in place of its weights; everything else as it is."""
    if not any(name.startswith("model_ema.") for name in file.tensors):
        raise CheckpointError(f"{where}: holds no moving averages (model_ema.*)")

    def read(name: str) -> np.ndarray:
        if not name.startswith(f"{ldm.UNET}."):
            return file.read(name)
        # The averages' names are the weights' without dots: model_ema.diffusion_modelinput_blocks00weight
        twin = "model_ema." + name.removeprefix("model.").replace(".", "")
        if twin not in file.tensors or file.tensors[twin].shape != file.tensors[name].shape:
            raise CheckpointError(f"{where}: {name} has no moving average {twin} of its shape")
        return file.read(twin)

    return read


def _constant(array: np.ndarray) -> Callable[[], np.ndarray]:
    return lambda: array


def _reader(file: TensorFile, name: str) -> Callable[[], np.ndarray]:
    return lambda: file.read(name)
