"""The commands that estimate depth and surface normals of images."""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from unclip_jax import __version__
from unclip_jax.cli_generate import (
    OPENING,
    add_memory,
    add_model,
    memory_of,
    mesh_of,
    model_name,
    next_run,
    open_file,
)
from unclip_jax.conditioning.address import is_address


class Estimate(NamedTuple):
    """pipeline: the class in `unclip_jax`. help: what the command does."""

    pipeline: str
    help: str


ESTIMATES = {
    "depth": Estimate("DepthPipeline", "estimate the depth of images"),
    "normals": Estimate("NormalsPipeline", "estimate the surface normals of images"),
}
# Options that are arguments of the call; the command line's names.
SETTINGS = ("ensemble_size", "processing_resolution", "scheduler", "seed", "batch_size")


def add_estimates(commands: Any) -> None:
    """Adds the commands to argparse's."""
    for name, command in ESTIMATES.items():
        more = (
            " and one in 16 bits of gray, white is near, for --depth-map and --control-image" if name == "depth" else ""
        )
        p = commands.add_parser(
            name,
            help=command.help,
            description=f"To {command.help}, with a checkpoint such as prs-eth/marigold-{name}-v1-1. Writes one PNG in "
            f"colours per image{more}.",
        )
        p.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or their addresses (http, https)")
        add_model(p)
        how = p.add_argument_group("how")
        how.add_argument("--steps", type=int, metavar="N", help="1..1000; default the checkpoint's own")
        how.add_argument(
            "--ensemble-size", type=int, default=1, metavar="N", help="predictions of each image; default 1"
        )
        how.add_argument(
            "--processing-resolution", type=int, metavar="N", help="longest side in pixels, 0 for the image's own"
        )
        how.add_argument("--scheduler", metavar="S", help="solver; default the checkpoint's own")
        how.add_argument("--seed", type=int, default=0, metavar="K", help="0..2**32-1")
        how.add_argument("--batch-size", type=int, metavar="N", help="predictions at a time; default all of an image")
        how.add_argument("--out", type=Path, default=Path(name), metavar="DIR", help=f"default ./{name}")
        add_memory(p)


def estimate(args: argparse.Namespace) -> None:
    """Writes the maps and prints their paths."""
    for path in args.images:
        if not is_address(path) and not Path(path).is_file():
            raise FileNotFoundError(f"IMAGE: no such file: {path}")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file; want a directory")

    import jax

    import unclip_jax
    from unclip_jax.estimation.colours import nearness_picture
    from unclip_jax.image_files import save_png

    overrides = {name: value for name in OPENING if (value := getattr(args, name, None)) is not None}
    kind = getattr(unclip_jax, ESTIMATES[args.command].pipeline)
    pipe = kind.from_pretrained(
        args.model, dtype=args.dtype, mesh=mesh_of(args.devices), memory=memory_of(args), **overrides
    )
    settings = {"num_inference_steps": args.steps, **{name: getattr(args, name) for name in SETTINGS}}
    args.out.mkdir(parents=True, exist_ok=True)
    run = next_run(args.out)
    common = {"command": args.command, **settings, "model": model_name(args.model)}
    common |= {"dtype": jax.numpy.dtype(pipe.dtype).name, "version": __version__}
    for index, name in enumerate(args.images):  # one at a time: they may be of several sizes
        opened = open_file(name)
        out = pipe(opened.image, **settings)
        recipe = {**common, "index": index, "images": [opened.origin]}
        made = {f"{run:04d}-{index:03d}.png": out.images[0]}
        if args.command == "depth":
            near_is_more = pipe.config.estimator.prediction_type == "disparity"
            far = 1 - out.prediction[0] if near_is_more else out.prediction[0]
            made[f"{run:04d}-{index:03d}-near.png"] = nearness_picture(far)
        for file, image in made.items():
            save_png(args.out / file, image, {**recipe, "width": image.width, "height": image.height})
            print(args.out / file)
