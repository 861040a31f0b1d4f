"""`--from INPUT` of the commands that make images: a bulk job instead of a few images, see `unclip_jax.bulk`."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

# Of the command line's settings: what a table's columns say instead.
OF_ROWS = ("weights",)


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

    given = [f"--{name}" for name in OF_ROWS if getattr(args, name, None) is not None]
    if given:
        raise ValueError(f"{given[0]} is each row's own: make it a column of {args.rows}")
    names = dict(_pair(text) for text in args.columns)
    max_errors = 0 if args.strict else args.max_errors
    options: dict[str, Any] = {"save": args.save, "batch_size": args.batch_size or 8, "names": names}
    options |= {name: value for name, value in settings.items() if value is not None}
    pipe = open_pipeline(args)
    if args.dry_run:
        print("\n".join(bulk.dry_run(pipe, args.rows, **options)))
        return
    import jax

    from unclip_jax.distributed.hosts import each

    options |= {"host": jax.process_index(), "hosts": jax.process_count()}
    options |= {"shards": args.shards, "part_size": args.part_size, "max_errors": max_errors}
    summary = bulk.run(pipe, args.rows, args.out, **options)
    print("\n".join(summary.lines()))
    each(None)  # JAX would end the hosts that are five minutes behind the first to leave
    if summary.failed:
        print(f"{summary.failed} rows failed: {args.out}/manifest has the reasons", file=sys.stderr)


def _pair(text: str) -> tuple[str, str]:
    column, equals, argument = text.partition("=")
    if not (column and equals and argument):
        raise ValueError(f"--columns {text}: want COLUMN=ARGUMENT, as in text_en=prompt")
    return column, argument
