"""python -m convert SRC DST: a PyTorch checkpoint becomes a directory that unclip_jax opens at once."""

import argparse
import functools
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from unclip_jax.checkpoints.places import place_of
from unclip_jax.cli_messages import message
from unclip_jax.conditioning.address import shown
from unclip_jax.interruption import termination_interrupts
from unclip_jax.progress import Progress


def parser() -> argparse.ArgumentParser:
    """The command line. Built without importing JAX, so that --help answers at once."""
    p = argparse.ArgumentParser(
        prog="python -m convert",
        description="Converts Stable Diffusion 2 checkpoints between PyTorch's formats and ours, without PyTorch.",
    )
    p.add_argument(
        "source",
        help="original .ckpt/.safetensors file, diffusers folder or converted directory; on the hub: owner/name, "
        "owner/name/FILE, or an address",
    )
    p.add_argument("destination", nargs="?", help="what to write: a folder, or NAME.safetensors; it must not exist")
    p.add_argument(
        "--to",
        choices=("jax", "orbax", "diffusers", "original"),
        default="jax",
        help="our own directory (default), the same with the parameters in orbax's format, a diffusers folder, or one "
        ".safetensors file with the original's names",
    )
    p.add_argument(
        "--check", action="store_true", help="prove the mapping from names, shapes and dtypes; write nothing"
    )
    p.add_argument("--config", metavar="YAML", help="the original's yaml, or a published checkpoint's name")
    p.add_argument("--prediction-type", metavar="P", help="what the UNet predicts: epsilon or v_prediction")
    p.add_argument("--vae", metavar="SRC", help="another VAE than the source's own: file, folder or hub id")
    p.add_argument("--unet", metavar="SRC", help="another UNet than the source's own: file, folder or hub id")
    p.add_argument(
        "--clip-stats", metavar="FILE", help="statistics of the image embeddings (OpenAI encoder): .th, .npz"
    )
    p.add_argument("--text-encoder", metavar="FILE", help="OpenAI's ViT-L-14.pt, for Karlo's prior")
    p.add_argument("--variant", help="of a diffusers folder or hub id, such as fp16")
    p.add_argument("--revision", help="of a hub id: branch, tag or commit")
    p.add_argument("--subfolder", metavar="DIR", help="where in the source the checkpoint is")
    p.add_argument("--preprocess", help="record another image preprocessing than the source's own")
    p.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="of the written weights; default: as read"
    )
    p.add_argument("--ema", action="store_true", help="take the moving averages of an original file's UNet")
    p.add_argument("--sha256", metavar="HEX", help="refuse the source file unless this is its SHA-256")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 done, 2 for what is refused (one line on stderr), 1 for anything else."""
    args = parser().parse_args(argv)
    if args.check == (args.destination is not None):
        print("convert: give a destination, or --check and none", file=sys.stderr)
        return 2
    with warnings.catch_warnings(), termination_interrupts():
        warnings.showwarning = lambda text, *_, **__: print(f"convert: warning: {message(text)}", file=sys.stderr)
        try:
            return check(args) if args.check else convert(args)
        except (ValueError, OSError, ImportError) as error:  # the last for an extra that is not installed
            print(f"convert: {message(error)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            written = args.destination is not None and Path(args.destination).exists()
            print(f"convert: interrupted; {'all is' if written else 'nothing was'} written", file=sys.stderr)
            return 1


def check(args: argparse.Namespace) -> int:
    """Proves the mapping and says what was found."""
    from convert.clip import is_clip
    from convert.source import check_source
    from unclip_jax.checkpoints.directory import is_directory_checkpoint
    from unclip_jax.checkpoints.source import file_beside, open_checkpoint

    path = _path(args)
    if path is None or (path.is_dir() and is_directory_checkpoint(path)) or is_clip(path):
        with open_checkpoint(args.source if path is None else path, config=args.config) as checkpoint:
            print(f"complete: {len(checkpoint.params)} parameters, each there with its shape")
        return 0
    names = ("config", "text_encoder")
    files = {name: value for name in names if (value := getattr(args, name)) is not None}
    for name, value in files.items():
        if place_of(value) is not None:
            files[name] = file_beside(name, value)
    options = {name: getattr(args, name) for name in ("prediction_type", "variant", "ema")}
    report = check_source(path, **files, **options)
    print(f"complete: {len(report.used)} tensors are used, each there with its shape")
    for note in report.notes:
        print(message(note))
    for reason, count in Counter(report.unused.values()).items():
        print(f"{count} tensors are not used: {reason}")
    return 0


def convert(args: argparse.Namespace) -> int:
    """Opens the source and writes it in the layout asked for."""
    import ml_dtypes
    import numpy as np

    from convert.export.diffusers import save_diffusers
    from convert.export.original import save_original
    from unclip_jax.checkpoints.atomic import require_absent
    from unclip_jax.checkpoints.directory import save, sha256
    from unclip_jax.checkpoints.source import open_checkpoint

    require_absent(Path(args.destination))
    digests, path, source = {}, _path(args), shown(args.source)
    if args.sha256 is not None:
        if path is None or not path.is_file():
            raise ValueError(f"--sha256 is for a single file, and {source} is none")
        digests = _digests([path], Progress, sha256)
        if digests[path.name] != args.sha256.lower():
            raise ValueError(f"{source}: SHA-256 is {digests[path.name]}, not {args.sha256}")
    names = ("config", "prediction_type", "clip_stats", "text_encoder", "vae", "unet", "variant", "preprocess", "ema")
    options = {name: getattr(args, name) for name in names}
    dtype = {None: None, "bfloat16": np.dtype(ml_dtypes.bfloat16)}.get(args.dtype, args.dtype and np.dtype(args.dtype))
    with open_checkpoint(args.source if path is None else path, **options) as checkpoint:
        parameters = sum(int(np.prod(p.shape, dtype=np.int64)) for p in checkpoint.params.values())
        print(
            f"{source}: {len(checkpoint.params)} parameters, {parameters / 1e6:,.1f} million numbers, "
            f"{checkpoint.nbytes / 1e9:.2f} GB"
        )
        save_as: dict[str, Callable[..., list[Path]]] = {"original": save_original, "diffusers": save_diffusers}
        if args.to in ("jax", "orbax"):
            digests = digests or _digests([p for p in checkpoint.files if Path(p).is_file()], Progress, sha256)
            recorded = {"source": Path(source).name, "sha256": digests, "dtype": args.dtype or "as in the source"}
            layout: Literal["safetensors", "orbax"] = "orbax" if args.to == "orbax" else "safetensors"
            save_as[args.to] = functools.partial(save, layout=layout, provenance=recorded)
        with Progress("writing", checkpoint.nbytes, unit="B", bytes_=True) as bar:
            written = save_as[args.to](checkpoint, Path(args.destination), dtype=dtype, progress=bar.update)
    for path in written:
        print(f"wrote {path}")
    return 0


def _path(args: argparse.Namespace) -> Path | None:
    """Where the source is on this machine, fetched if need be; None for a name of open_clip's."""
    from unclip_jax.checkpoints.source import OPEN_CLIP, local_path

    if args.source.startswith(OPEN_CLIP):
        return None
    return local_path(args.source, revision=args.revision, variant=args.variant, subfolder=args.subfolder)


def _digests(files: list[Path], progress: Any, sha256: Any) -> dict[str, str]:
    """SHA-256 of each file by its name (and folder's name, for files of a diffusers folder)."""
    with progress("hashing the source", sum(Path(f).stat().st_size for f in files), unit="B", bytes_=True) as bar:
        names = [Path(f).name if len(files) == 1 else f"{Path(f).parent.name}/{Path(f).name}" for f in files]
        return {name: sha256(Path(f), bar.update) for name, f in zip(names, files, strict=True)}


if __name__ == "__main__":
    sys.exit(main())
