"""python -m convert SRC DST: a PyTorch checkpoint becomes a directory that unclip_jax opens at once."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def parser() -> argparse.ArgumentParser:
    """The command line. Built without importing JAX, so that --help answers at once."""
    p = argparse.ArgumentParser(
        prog="python -m convert",
        description="Converts a Stable Diffusion 2.1 unCLIP checkpoint to unclip_jax's own format, without PyTorch.",
    )
    p.add_argument("source", help="original .ckpt/.safetensors file, diffusers folder, converted directory or hub id")
    p.add_argument("destination", nargs="?", help="directory to write; it must not exist")
    p.add_argument(
        "--check", action="store_true", help="prove the mapping from names, shapes and dtypes; write nothing"
    )
    p.add_argument("--config", metavar="YAML", help="the original's yaml, for unpublished architectures")
    p.add_argument(
        "--clip-stats", metavar="FILE", help="statistics of the image embeddings (OpenAI encoder): .th, .npz"
    )
    p.add_argument("--variant", help="of a diffusers folder or hub id, such as fp16")
    p.add_argument("--revision", help="of a hub id: branch, tag or commit")
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
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"convert: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("convert: interrupted; nothing was written", file=sys.stderr)
        return 1


def run(args: argparse.Namespace) -> int:
    """Opens, checks, writes."""
    import ml_dtypes
    import numpy as np

    from unclip_jax.checkpoints.directory import save, sha256
    from unclip_jax.checkpoints.source import open_checkpoint
    from unclip_jax.pipelines.progress import Progress

    if args.destination is not None and Path(args.destination).exists():
        raise FileExistsError(f"{args.destination} exists; choose another name or remove it")
    digests = {}
    if args.sha256 is not None:
        if not Path(args.source).is_file():
            raise ValueError(f"--sha256 is for a single file, and {args.source} is none")
        digests = _digests([Path(args.source)], Progress, sha256)
        if digests[Path(args.source).name] != args.sha256.lower():
            raise ValueError(f"{args.source}: SHA-256 is {digests[Path(args.source).name]}, not {args.sha256}")
    options = {k: getattr(args, k) for k in ("config", "clip_stats", "variant", "revision", "preprocess", "ema")}
    with open_checkpoint(args.source, **options) as checkpoint:
        parameters = sum(int(np.prod(p.shape, dtype=np.int64)) for p in checkpoint.params.values())
        print(
            f"{args.source}: {len(checkpoint.params)} parameters, {parameters / 1e6:,.1f} million numbers, "
            f"{checkpoint.nbytes / 1e9:.2f} GB"
        )
        if args.check:
            print("complete: every tensor of every network is there with its shape")
            return 0
        digests = digests or _digests([p for p in checkpoint.files if Path(p).is_file()], Progress, sha256)
        dtype = {None: None, "bfloat16": np.dtype(ml_dtypes.bfloat16)}.get(
            args.dtype, args.dtype and np.dtype(args.dtype)
        )
        with Progress("writing", checkpoint.nbytes, unit="B", bytes_=True) as bar:
            recorded = {"source": Path(args.source).name, "sha256": digests, "dtype": args.dtype or "as in the source"}
            save(checkpoint, Path(args.destination), dtype=dtype, provenance=recorded, progress=bar.update)
    print(f"wrote {args.destination}")
    return 0


def _digests(files: list[Path], progress: Any, sha256: Any) -> dict[str, str]:
    """SHA-256 of each file by its name (and folder's name, for files of a diffusers folder)."""
    with progress("hashing the source", sum(Path(f).stat().st_size for f in files), unit="B", bytes_=True) as bar:
        names = [Path(f).name if len(files) == 1 else f"{Path(f).parent.name}/{Path(f).name}" for f in files]
        return {name: sha256(Path(f), bar.update) for name, f in zip(names, files, strict=True)}


if __name__ == "__main__":
    sys.exit(main())
