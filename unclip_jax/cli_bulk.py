"""`--from INPUT` of the commands that make images: a bulk job instead of a few images, see `unclip_jax.bulk`."""

import argparse
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from unclip_jax.cli_controlnet import open_controls

# Of the command line's settings: what a table's columns say instead.
OF_ROWS = ("weights", "control_image")
OF_CLUSTERS = ("address", "workers", "worker_gpus", "worker_tpus", "worker_cpus")


def add_rows(command: argparse.ArgumentParser) -> None:
    """Adds the options of bulk jobs."""
    rows = command.add_argument_group("many rows", "docs/bulk.md")
    rows.add_argument(
        "--from",
        dest="rows",
        metavar="INPUT",
        help="a folder of images; .jsonl, .csv or .parquet with columns named as arguments; webdataset's .tar; - for "
        "JSON lines from standard input. Here or at an address of fsspec. What is made goes to --out, and a job that "
        "was interrupted goes on there",
    )
    rows.add_argument(
        "--columns", nargs="+", default=[], metavar="COLUMN=ARGUMENT", help="columns that are called otherwise"
    )
    rows.add_argument(
        "--save", default="png", metavar="S", help="png, jpeg, webp, latents or image_embeds; default png"
    )
    rows.add_argument("--shards", action="store_true", help="one tar for each part, as webdataset reads it")
    rows.add_argument("--part-size", type=int, default=1024, metavar="N", help="rows of a part; default 1024")
    rows.add_argument("--max-errors", type=int, metavar="N", help="stop when more rows fail; default: never")
    rows.add_argument("--strict", action="store_true", help="stop when a row fails")
    rows.add_argument("--dry-run", action="store_true", help="say what would be made, and how long it would take")
    many = command.add_argument_group("on a cluster", "docs/cluster.md")
    many.add_argument("--engine", choices=["ray"], help="runs the job there; default: in this process")
    many.add_argument("--address", metavar="A", help="HOST:PORT or auto; default: RAY_ADDRESS, or this machine")
    many.add_argument("--workers", type=int, nargs="+", metavar="N", help="processes, or the least and the most")
    one = many.add_mutually_exclusive_group()
    one.add_argument("--worker-gpus", type=int, metavar="N", help="of each worker")
    one.add_argument("--worker-tpus", type=int, metavar="N", help="of each worker: all of a host")
    one.add_argument(
        "--worker-cpus", type=int, metavar="N", help="of each worker, where it has no other devices; default 1"
    )


def make_rows(
    args: argparse.Namespace, open_pipeline: Callable[[argparse.Namespace], Any], settings: dict[str, Any]
) -> None:
    """Runs the bulk job, and prints what it has come to.

    Args:
        args: Of the command line.
        open_pipeline: Opens the pipeline that they name.
        settings: Of every call.
    """
    from unclip_jax import bulk

    given = [f"--{name.replace('_', '-')}" for name in OF_ROWS if getattr(args, name, None) is not None]
    if given:
        raise ValueError(f"{given[0]} is each row's own: make it a column of {args.rows}")
    given = [f"--{name.replace('_', '-')}" for name in OF_CLUSTERS if getattr(args, name) is not None]
    if given and args.engine is None:
        raise ValueError(f"{given[0]} is of a cluster: give --engine ray, too")
    names = dict(_pair(text) for text in args.columns)
    max_errors = 0 if args.strict else args.max_errors
    options: dict[str, Any] = {"save": args.save, "batch_size": args.batch_size or 8, "names": names}
    options |= {name: value for name, value in settings.items() if value is not None}
    if args.engine is None or args.dry_run:
        pipe = open_pipeline(args)
        options |= open_controls(args, pipe) if getattr(args, "controlnet", None) else {}
    if args.dry_run:
        print("\n".join(bulk.dry_run(pipe, args.rows, **options)))
        return
    options |= {"shards": args.shards, "part_size": args.part_size, "max_errors": max_errors}
    if args.engine is None:
        import jax

        from unclip_jax.distributed.hosts import each

        options |= {"host": jax.process_index(), "hosts": jax.process_count()}
        summary = bulk.run(pipe, args.rows, args.out, **options)
    else:  # where this process leaves the devices to the workers
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's remarks on itself, among ours
        opening = functools.partial(open_pipeline, args)
        summary = bulk.run_on_ray(opening, args.rows, args.out, **_cluster(args), **options)
    print("\n".join(summary.lines()))
    if args.engine is None:
        each(None)  # JAX would end the hosts that are five minutes behind the first to leave
    if summary.failed:
        print(f"{summary.failed} rows failed: {args.out}/manifest has the reasons", file=sys.stderr)


def _cluster(args: argparse.Namespace) -> dict[str, Any]:
    """Where a job runs: arguments of `bulk.run_on_ray`."""
    workers = args.workers or [1]
    if len(workers) > 2:
        raise ValueError(f"--workers {' '.join(map(str, workers))}: want a number, or the least and the most")
    where = {"address": args.address, "workers": workers[0] if len(workers) == 1 else tuple(workers)}
    if args.worker_gpus is not None:
        return {**where, "resources": {"num_gpus": args.worker_gpus}}
    if args.worker_tpus is not None:
        return {**where, "resources": {"resources": {"TPU": args.worker_tpus}}}
    return {**where, "resources": {"num_cpus": 1 if args.worker_cpus is None else args.worker_cpus}}


def _pair(text: str) -> tuple[str, str]:
    column, equals, argument = text.partition("=")
    if not (column and equals and argument):
        raise ValueError(f"--columns {text}: want COLUMN=ARGUMENT, as in text_en=prompt")
    return column, argument
