"""`--controlnet` of the commands that make images: ControlNets, and the images that they read."""

import argparse
from collections.abc import Sequence
from typing import Any

# Options with one value for all ControlNets, or one for each, named as the arguments of the call.
SCALES = {
    "controlnet_conditioning_scale": "how much it adds",
    "control_guidance_start": "0..1, the share of the steps after which it begins to add",
    "control_guidance_end": "0..1, the share of the steps after which it no longer does",
}


def add_controls(command: argparse.ArgumentParser) -> None:
    """Adds the options."""
    group = command.add_argument_group("ControlNets", "docs/controlnet.md")
    group.add_argument("--controlnet", nargs="+", metavar="SRC", help="folder, file or hub id; several add up")
    group.add_argument(
        "--control-image", nargs="+", metavar="FILE", help="what it reads, of the image's size; one for each ControlNet"
    )
    for name, text in SCALES.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=float, nargs="+", metavar="X", help=text)
    group.add_argument("--guess-mode", action="store_true", help="let the image speak without a prompt")


def check_controls(args: argparse.Namespace) -> None:
    """Refuses what does not go together. Raises ValueError."""
    nets, images = args.controlnet or [], args.control_image or []
    if args.engine is not None and nets:
        raise ValueError("--controlnet with --engine: the workers of a cluster cannot be sent one")
    if images and len(images) != len(nets):
        raise ValueError(f"--control-image has {len(images)} files for {len(nets)} ControlNets; want one for each")
    if nets and not images and args.rows is None:
        raise ValueError("--controlnet needs --control-image, the image that it reads")
    for name in SCALES:
        values = getattr(args, name)
        if values is not None and len(values) not in (1, len(nets)):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{option} has {len(values)} values for {len(nets)} ControlNets; want one, or one for each"
            )


def open_controls(args: argparse.Namespace, pipe: Any, images: Sequence[Any] = ()) -> dict[str, Any]:
    """The arguments of a call with ControlNets. images: of `--control-image`, opened; none where rows have them."""
    from unclip_jax import ControlNet

    nets = [ControlNet.from_pretrained(source, pipe.dtype, pipe.mesh) for source in args.controlnet]
    one = len(nets) == 1
    given: dict[str, Any] = {"controlnet": nets[0] if one else nets}
    if images:
        given["control_image"] = images[0] if one else list(images)
    return given


def scales_of(args: argparse.Namespace) -> dict[str, Any]:
    """The scales, windows and mode that were given, as arguments of the call."""
    given = {name: values for name in SCALES if (values := getattr(args, name)) is not None}
    mode = {"guess_mode": True} if args.guess_mode else {}
    return mode | {name: values[0] if len(values) == 1 else values for name, values in given.items()}
