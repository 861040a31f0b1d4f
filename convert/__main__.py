"""python -m convert SRC DST: converts a PyTorch checkpoint to a directory that unclip_jax opens directly.

python -m convert add-difference A B C DST: merges three checkpoints to A + scale (B - C).
Both are also `unclip-jax convert`, which works where a file convert.py in the working directory hides this package.
"""

import argparse
import functools
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from unclip_jax.checkpoints.places import OPEN_CLIP, place_of
from unclip_jax.cli_messages import message
from unclip_jax.conditioning.address import shown
from unclip_jax.interruption import termination_interrupts
from unclip_jax.progress import Progress

PROGRAM = "python -m convert"
ADD_DIFFERENCE = "add-difference"
DESTINATION = "what to write: a folder, or NAME.safetensors; it must not exist. Not with --push"


def parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """The command line of `program`. Built without importing JAX, so that --help answers at once."""
    p = argparse.ArgumentParser(
        prog=program,
        description="Converts Stable Diffusion 2 checkpoints between PyTorch's formats and ours, without PyTorch.",
        epilog=f"{program} {ADD_DIFFERENCE} A B C DST merges three checkpoints: see its own --help. A file "
        f"or folder of that name is ./{ADD_DIFFERENCE}.",
    )
    p.add_argument(
        "source",
        help="original .ckpt/.safetensors file, diffusers folder or converted directory; on the hub: owner/name, "
        "owner/name/FILE, or an address",
    )
    p.add_argument("destination", nargs="?", help=DESTINATION)
    p.add_argument(
        "--check", action="store_true", help="prove the mapping from names, shapes and dtypes; write nothing"
    )
    p.add_argument("--sha256", metavar="HEX", help="refuse the source file unless this is its SHA-256")
    _add_options(p)
    return p


def difference_parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """The command line of `add-difference`, without that word."""
    p = argparse.ArgumentParser(
        prog=f"{program} {ADD_DIFFERENCE}",
        description="Writes A + scale (B - C): A with what the fine-tune B has learnt since its base C. Each may be of "
        "any layout. What B and C do not both have stays A's. Options without a letter are for A and the result, as in "
        "a conversion; a B or C that needs other options must be converted first.",
    )
    for name, what in {"a": "the checkpoint to change", "b": "a fine-tune of C", "c": "the base of B"}.items():
        p.add_argument(name, metavar=name.upper(), help=what)
    p.add_argument("destination", metavar="DST", nargs="?", help=DESTINATION)
    p.add_argument("--scale", type=float, default=1.0, metavar="S", help="of the difference; default 1")
    p.add_argument("--config-b", metavar="YAML", help="as --config, of B")
    p.add_argument("--config-c", metavar="YAML", help="as --config, of C")
    _add_options(p)
    return p


def _add_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--to",
        choices=("jax", "orbax", "diffusers", "original"),
        help="our own directory (default), the same with the parameters in orbax's format, a diffusers folder, or one "
        ".safetensors file with the original's names",
    )
    p.add_argument(
        "--config",
        metavar="YAML",
        help="the original's yaml, a published checkpoint's name, or a ControlNet's config.json",
    )
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
    p.add_argument("--ema", action="store_true", help="read the EMA weights of an original file's UNet")
    p.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="upload a diffusers folder with a model card to the hub, with the login's token or HF_TOKEN, and write "
        "nothing here",
    )
    p.add_argument("--private", action="store_true", help="--push to a private repository, if it is new")


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Runs the command. Exit status 0: done; 2: refused (one line on stderr); 1: anything else.

    program: the name of the command in its usage line.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    # Intermixed: the destination is optional, and otherwise not seen behind an option.
    if arguments[:1] == [ADD_DIFFERENCE]:
        args, run = difference_parser(program).parse_intermixed_args(arguments[1:]), merge
    else:
        args = parser(program).parse_intermixed_args(arguments)
        run = check if args.check else convert
    if problem := _problem(args):
        print(f"convert: {problem}", file=sys.stderr)
        return 2
    with warnings.catch_warnings(), termination_interrupts():
        warnings.showwarning = lambda text, *_, **__: print(f"convert: warning: {message(text)}", file=sys.stderr)
        try:
            return run(args)
        except (ValueError, OSError, ImportError) as error:  # the last for an extra that is not installed
            print(f"convert: {message(error)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            written = args.destination is not None and Path(args.destination).exists()
            print(f"convert: interrupted; {'all is' if written else 'nothing was'} written", file=sys.stderr)
            return 1


def _problem(args: argparse.Namespace) -> str | None:
    """What is wrong with the options together."""
    checks = getattr(args, "check", False)
    if [checks, args.push is not None, args.destination is not None].count(True) != 1:
        return "give a destination, or --push and none" + (", or --check and none" if hasattr(args, "check") else "")
    if args.private and args.push is None:
        return "--private is for --push"
    if args.push is not None and args.to not in (None, "diffusers"):
        return f"--push uploads a diffusers folder, and --to is {args.to}"
    return None


def check(args: argparse.Namespace) -> int:
    """Proves the mapping complete and reports what was found."""
    from convert.clip import is_clip
    from convert.source import check_source
    from unclip_jax.checkpoints.directory import is_directory_checkpoint
    from unclip_jax.checkpoints.local import file_beside
    from unclip_jax.checkpoints.source import open_checkpoint

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
    elsewhere = [part for part in ("unet", "vae") if getattr(args, part) is not None]
    report = check_source(path, **files, **options, without=elsewhere)
    print(f"complete: {len(report.used)} tensors are used, each there with its shape")
    for note in report.notes:
        print(message(note))
    for reason, count in Counter(report.unused.values()).items():
        print(f"{count} tensors are not used: {reason}")
    return 0


def convert(args: argparse.Namespace) -> int:
    """Opens the source and writes it in the requested layout."""
    from unclip_jax.checkpoints.source import open_checkpoint

    _require_absent(args)
    digests: dict[str, str] = {}
    path, source = _path(args), shown(args.source)
    if args.sha256 is not None:
        if path is None or not path.is_file():
            raise ValueError(f"--sha256 is for a single file, and {source} is not one")
        digests = _digests([path])
        if digests[path.name] != args.sha256.lower():
            raise ValueError(f"{source}: SHA-256 is {digests[path.name]}, not {args.sha256}")
    with open_checkpoint(args.source if path is None else path, **_options(args)) as checkpoint:
        print(f"{source}: {_size(checkpoint)}")

        def provenance() -> dict[str, Any]:
            return {"source": Path(source).name, "sha256": digests or _digests(checkpoint.files)}

        if args.push is not None:
            _push(args, checkpoint)
        else:
            _write(args, checkpoint, provenance)
    return 0


def merge(args: argparse.Namespace) -> int:
    """Opens three sources and writes A + scale (B - C) in the requested layout."""
    from convert.merge import add_difference, open_weights, require_scale, shared
    from unclip_jax.checkpoints.source import open_checkpoint

    require_scale(args.scale)
    _require_absent(args)
    with (
        open_checkpoint(args.a, **_options(args), revision=args.revision, subfolder=args.subfolder) as a,
        open_weights(args.b, args.config_b) as b,
        open_weights(args.c, args.config_c) as c,
    ):
        merged = add_difference(a, b, c, args.scale, _dtype(args.dtype))
        changed = len(shared(a, b, c))
        print(f"{shown(args.a)}: {_size(a)}; a difference is added to {changed}, {len(a.params) - changed} are kept")

        def provenance() -> dict[str, Any]:
            sources = {"a": (args.a, a), "b": (args.b, b), "c": (args.c, c)}
            recorded = {
                letter: {"source": Path(shown(source)).name, "sha256": _digests(checkpoint.files)}
                for letter, (source, checkpoint) in sources.items()
            }
            return {"method": ADD_DIFFERENCE, "scale": args.scale, **recorded}

        if args.push is not None:
            sources = [source for checkpoint in (a, b, c) for source in checkpoint.sources]
            _push(args, merged, sources, f"they are A + {args.scale:g} (B - C) of the above, in this order")
        else:
            _write(args, merged, provenance)
    return 0


def _path(args: argparse.Namespace) -> Path | None:
    """The source's path on this machine, downloaded if necessary; None for a name of open_clip's."""
    from unclip_jax.checkpoints.local import local_path

    if args.source.startswith(OPEN_CLIP):
        return None
    return local_path(args.source, revision=args.revision, variant=args.variant, subfolder=args.subfolder)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The other arguments of `open_checkpoint` for a source on this machine."""
    names = ("config", "prediction_type", "clip_stats", "text_encoder", "vae", "unet", "variant", "preprocess", "ema")
    return {name: getattr(args, name) for name in names}


def _dtype(name: str | None) -> Any:
    import ml_dtypes
    import numpy as np

    return {None: None, "bfloat16": np.dtype(ml_dtypes.bfloat16)}.get(name, name and np.dtype(name))


def _size(checkpoint: Any) -> str:
    import numpy as np

    numbers = sum(int(np.prod(p.shape, dtype=np.int64)) for p in checkpoint.params.values())
    return (
        f"{len(checkpoint.params)} parameters, {numbers / 1e6:,.1f} million numbers, {checkpoint.nbytes / 1e9:.2f} GB"
    )


def _require_absent(args: argparse.Namespace) -> None:
    from unclip_jax.checkpoints.atomic import require_absent

    if args.destination is not None:
        require_absent(Path(args.destination))


def _push(
    args: argparse.Namespace, checkpoint: Any, sources: Sequence[str] | None = None, method: str | None = None
) -> None:
    """Uploads a checkpoint, and prints where it is. sources, method: see `convert.export.card.model_card`."""
    from unclip_jax.checkpoints.upload import push

    options = {"private": args.private or None, "dtype": _dtype(args.dtype), "sources": sources, "method": method}
    print(f"uploaded {push(checkpoint, args.push, **options)}")


def _write(args: argparse.Namespace, checkpoint: Any, provenance: Callable[[], Mapping[str, Any]]) -> None:
    """Writes a checkpoint as the options say, and prints what was written. provenance: only for our own layouts."""
    from convert.export.diffusers import save_diffusers
    from convert.export.original import save_original
    from unclip_jax.checkpoints.directory import save

    save_as: dict[str, Callable[..., list[Path]]] = {"original": save_original, "diffusers": save_diffusers}
    to = "jax" if args.to is None else args.to
    if to in ("jax", "orbax"):
        recorded = {**provenance(), "dtype": args.dtype or "as in the source"}
        layout: Literal["safetensors", "orbax"] = "orbax" if to == "orbax" else "safetensors"
        save_as[to] = functools.partial(save, layout=layout, provenance=recorded)
    with Progress("writing", checkpoint.nbytes, unit="B", bytes_=True) as bar:
        written = save_as[to](checkpoint, Path(args.destination), dtype=_dtype(args.dtype), progress=bar.update)
    for path in written:
        print(f"wrote {path}")


def _digests(sources: Sequence[Path]) -> dict[str, str]:
    """The SHA-256 of each file by its name (and its folder's name, for files in a folder)."""
    from unclip_jax.checkpoints.directory import sha256

    inside = [path for source in sources for path in (source, *sorted(Path(source).rglob("*")))]
    files = [Path(path) for path in inside if Path(path).is_file()]
    with Progress("hashing the source", sum(f.stat().st_size for f in files), unit="B", bytes_=True) as bar:
        names = [f.name if len(files) == 1 else f"{f.parent.name}/{f.name}" for f in files]
        return {name: sha256(f, bar.update) for name, f in zip(names, files, strict=True)}


if __name__ == "__main__":
    sys.exit(main())
