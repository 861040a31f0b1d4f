"""`unclip-jax ...`: a thin layer over the Python API."""

import argparse
import atexit
import dataclasses
import gc
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unclip_jax import __version__
from unclip_jax.cli_estimate import ESTIMATES, add_estimates, estimate
from unclip_jax.cli_generate import (
    COMMANDS,
    OPENING,
    add_commands,
    add_hosts,
    add_memory,
    join_hosts,
    make,
    memory_of,
    mesh_of,
    model_name,
)
from unclip_jax.cli_messages import message
from unclip_jax.conditioning.address import is_address, shown
from unclip_jax.interruption import termination_interrupts


def parser() -> argparse.ArgumentParser:
    """The command line. Built without importing JAX, so that --help answers at once."""
    p = argparse.ArgumentParser(prog="unclip-jax", description="Stable Diffusion 2 and its unCLIP in JAX.")
    p.add_argument("--version", action="version", version=f"unclip_jax {__version__}")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    add_commands(commands)
    add_estimates(commands)

    i = commands.add_parser("info", help="versions and devices; what a checkpoint is; an image's recipe")
    i.add_argument("source", nargs="?", metavar="SRC|IMAGE.png", help="a checkpoint, or an image made by this program")
    i.add_argument("--json", action="store_true", help="print JSON")
    for name in ("config", "prediction_type", "clip_stats", "vae", "unet", "variant", "revision", "subfolder"):
        i.add_argument(f"--{name.replace('_', '-')}", metavar=name.upper(), help="as for variations")
    planned = i.add_argument_group("memory that a run would need", "compiles the programs, runs nothing")
    planned.add_argument("--plan", action="store_true", help="print each stage's peak memory on a device")
    planned.add_argument("--height", type=int, metavar="H", help="pixels; default the checkpoint's")
    planned.add_argument("--width", type=int, metavar="W", help="pixels; default the checkpoint's")
    planned.add_argument("--batch", type=int, default=1, metavar="N", help="images at a time; default 1")
    planned.add_argument("--dtype", metavar="D", help="as for variations")
    planned.add_argument("--devices", type=int, metavar="N", help="as for variations")
    planned.add_argument("--model-parallel", type=int, default=1, metavar="N", help="as for variations")
    add_memory(i)

    _add_compile(commands)

    t = commands.add_parser(
        "train",
        help="train or fine-tune a network",
        description="Trains by the settings in a YAML file: a UNet, an adapter (LoRA), a textual inversion embedding, "
        "an autoencoder, a tiny one or a CLIP model. An interrupted run resumes where it stopped. docs/training.md has "
        "the settings.",
    )
    t.add_argument("config", type=Path, metavar="CONFIG", help="the settings, a YAML file")
    t.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="overrides a setting, as in run.total_steps=500"
    )
    add_hosts(t)
    _add_evaluate(commands)
    commands.add_parser("convert", help="convert checkpoints between PyTorch's formats and ours", add_help=False)
    return p


def _add_compile(commands: Any) -> None:
    c = commands.add_parser(
        "compile",
        help="compile programs ahead, for quick starts",
        description="Writes the compiled programs of calls of one size, so that later processes on such a device start "
        "without compiling. Reads no weights and makes no images. docs/start.md says what has to be equal.",
    )
    c.add_argument("source", nargs="?", metavar="SRC", help="a checkpoint; default the demo")
    for name in OPENING:
        c.add_argument(f"--{name.replace('_', '-')}", metavar=name.upper(), help="as for variations")
    c.add_argument("--height", type=int, metavar="H", help="pixels; default the checkpoint's")
    c.add_argument("--width", type=int, metavar="W", help="pixels; default the checkpoint's")
    c.add_argument("--batch", type=int, default=1, metavar="N", help="images at a time; default 1")
    c.add_argument("--guidance-scale", type=float, metavar="G", help="1 for none; other values make no difference")
    c.add_argument("--guidance-rescale", type=float, metavar="R", help="as for variations")
    c.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="as for variations")
    c.add_argument("--pag-scale", type=float, metavar="G", help="as for variations")
    c.add_argument("--scheduler", metavar="S", help="solver; default the checkpoint's own")
    c.add_argument("--eta", type=float, metavar="E", help="as for variations")
    c.add_argument("--dtype", metavar="D", help="as for variations")
    c.add_argument("--devices", type=int, metavar="N", help="as for variations")
    add_memory(c)
    c.add_argument("--out", type=Path, metavar="DIR", help="default SRC/executables, where later processes look")


def _add_evaluate(commands: Any) -> None:
    e = commands.add_parser(
        "evaluate",
        help="measure checkpoints: FID, CLIP-FID, CMMD, CLIP score, retention, diversity",
        description="Makes variations of images, with their captions at several guidance scales and without captions "
        "at several noise levels, and measures them as the model card does. Writes results.json, tables and plots. An "
        "interrupted evaluation resumes where it stopped.",
    )
    e.add_argument("models", nargs="*", metavar="MODEL", help="checkpoints; default the bundled one")
    e.add_argument("--images", required=True, metavar="DIR", help="an image folder, captions in its metadata")
    e.add_argument("--captions", type=Path, metavar="JSON", help="COCO's captions of these images instead")
    e.add_argument("--count", type=int, metavar="N", help="number of images (default: all)")
    e.add_argument("--clip", metavar="SRC", help="the CLIP model that judges; default the first checkpoint's own")
    e.add_argument(
        "--inception", type=Path, metavar="FILE", help="weights for FID, pt_inception-2015-12-05-6726825d.pth"
    )
    e.add_argument("--guidance-scale", type=float, nargs="*", metavar="G", help="default 1.5 2 3 4 5 6 7 8")
    e.add_argument("--noise-levels", type=int, nargs="*", metavar="N", help="default 0 200 400 600 800 1000")
    e.add_argument("--noise-level", type=int, default=0, metavar="N", help="of the images with prompts; default 0")
    e.add_argument("--level-guidance", type=float, default=3.0, metavar="G", help="at the noise levels; default 3")
    e.add_argument("--variations", type=int, default=4, metavar="N", help="per image and noise level; default 4")
    e.add_argument("--steps", type=int, default=50, metavar="N", help="default 50")
    e.add_argument("--scheduler", default="ddim", metavar="S", help="default ddim")
    e.add_argument("--batch-size", type=int, default=8, metavar="N", help="images at a time; default 8")
    e.add_argument("--seed", type=int, default=0, metavar="K")
    e.add_argument("--dtype", metavar="D", help="as for variations")
    e.add_argument("--devices", type=int, metavar="N", help="as for variations")
    e.add_argument("--out", type=Path, default=Path("evaluation"), metavar="DIR", help="default ./evaluation")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 done, 2 for bad usage or bad input (one line on stderr), 1 for anything else."""
    if argv is None:
        _collect_less_garbage()
        _silence_xla()
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["convert"]:
        return convert(arguments[1:])
    args = parser().parse_args(arguments)
    warnings.showwarning = lambda text, *_, **__: print(f"unclip-jax: warning: {message(text)}", file=sys.stderr)
    try:
        with termination_interrupts():
            _COMMANDS[args.command](args)
    except FloatingPointError as error:
        print(f"unclip-jax: {message(error)}", file=sys.stderr)
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"unclip-jax: {message(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("unclip-jax: interrupted", file=sys.stderr)
        return 1
    return 0


def _silence_xla() -> None:
    """Before JAX is imported: XLA logs errors that are none, pages of them on CPUs whose gathers are slow.

    Its loader of cached programs misses the preference against gathers among the host's features, see
    https://github.com/openxla/xla/issues/44565. What really fails raises an exception, too.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _collect_less_garbage() -> None:
    """In a process of our own: imports and traced programs are a million objects that stay until the end.

    Python would look for garbage among them 700 times, and all of them once more at exit: a second of a picture's six.
    """
    gc.set_threshold(10_000, 20)
    atexit.register(gc.freeze)


def convert(arguments: Sequence[str]) -> int:
    """The command line of `python -m convert`: whoever has a convert.py of his own reaches ours by this name."""
    from unclip_jax.checkpoints.foreign import run_converter

    try:
        return run_converter(arguments, "unclip-jax convert")
    except ImportError as error:
        print(f"unclip-jax: {message(error)}", file=sys.stderr)
        return 2


def info(args: argparse.Namespace) -> None:
    """Prints versions and devices, and what `source` is."""
    if args.plan and args.source is None:
        raise ValueError("--plan needs a checkpoint: give SRC")
    facts: dict[str, Any] = {}
    if args.source is not None and _named_like_an_image(args.source):
        from unclip_jax.image_files import read_recipe

        facts["recipe"] = read_recipe(args.source)
    elif args.source is not None:
        from unclip_jax.checkpoints.source import open_checkpoint

        options: dict[str, Any] = {name: getattr(args, name, None) for name in OPENING}
        with open_checkpoint(args.source, **options) as checkpoint:
            facts = {"plan": _plan(args, checkpoint)} if args.plan else {"checkpoint": checkpoint.describe()}
    else:
        facts = _environment()
    print(json.dumps(facts, indent=2, default=str) if args.json else "\n".join(_lines(facts)))


def _named_like_an_image(source: str) -> bool:
    name = shown(source) if is_address(source) else source
    return name.lower().startswith("data:") or name.lower().endswith((".png", ".jpg", ".jpeg", ".webp"))


def compile_ahead(args: argparse.Namespace) -> None:
    """Compiles programs ahead, and prints the files."""
    from unclip_jax.checkpoints.source import open_checkpoint
    from unclip_jax.pipelines.auto import pipeline_for
    from unclip_jax.pipelines.precompile import example_call, precompile

    options: dict[str, Any] = {name: getattr(args, name) for name in OPENING}
    names = ("guidance_scale", "guidance_rescale", "guidance_interval", "pag_scale", "scheduler", "eta")
    settings = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    with open_checkpoint(args.source, **options) as checkpoint:
        known = {field.name for field in dataclasses.fields(pipeline_for(checkpoint).task.arguments)}
        if unknown := settings.keys() - known:
            raise ValueError(f"{', '.join(sorted(unknown))}: not of the pipeline for this checkpoint")
        call = {**example_call(checkpoint, args.height, args.width, args.batch), **settings}
        files = precompile(checkpoint, call, args.out, args.dtype, mesh_of(args.devices), memory_of(args))
    print("\n".join(map(str, files)))


def train(args: argparse.Namespace) -> None:
    """Trains, and prints the result's path."""
    join_hosts(args)
    from unclip_jax.training.settings import read_settings
    from unclip_jax.training.tasks import run_training

    print(run_training(read_settings(args.config, args.set)))


def evaluate(args: argparse.Namespace) -> None:
    """Measures checkpoints, and prints the report's path."""
    from unclip_jax.checkpoints.source import open_checkpoint
    from unclip_jax.evaluation.features import clip_features, inception_features
    from unclip_jax.evaluation.protocol import Judges, Protocol, coco_captions
    from unclip_jax.evaluation.protocol import evaluate as measure
    from unclip_jax.evaluation.report import write_report
    from unclip_jax.pipelines.unclip import UnCLIPPipeline
    from unclip_jax.training.data import image_folder

    folder = Path(args.images)
    records = image_folder(folder) if args.captions is None else coco_captions(args.captions, folder)
    if args.count is not None and not 2 <= args.count <= len(records):
        raise ValueError(f"--count {args.count}: want 2 to {len(records)}")
    given = {"guidance_scales": args.guidance_scale, "noise_levels": args.noise_levels}
    protocol = Protocol(
        **{name: tuple(values) for name, values in given.items() if values is not None},
        scheduler=args.scheduler,
        steps=args.steps,
        noise_level=args.noise_level,
        level_guidance=args.level_guidance,
        variations=args.variations,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    mesh, models = mesh_of(args.devices), args.models or [None]
    inception = None
    if args.inception is not None:
        from unclip_jax.checkpoints.foreign import open_inception

        inception = inception_features(open_inception(args.inception), mesh, args.batch_size)
    names = (model_name(args.clip or models[0]), *([] if args.inception is None else [model_name(args.inception)]))
    with open_checkpoint(args.clip or models[0]) as checkpoint:
        judges = Judges(names, clip_features(checkpoint, mesh, args.batch_size), inception)
    results = []
    for model in models:
        pipe = UnCLIPPipeline.from_pretrained(model, dtype=args.dtype, mesh=mesh)
        pipe.progress = False
        results.append(measure(model_name(model), pipe, records[: args.count], judges, protocol, args.out))
    print("\n".join(map(str, write_report(results, args.out))))


def _plan(args: argparse.Namespace, checkpoint: Any) -> dict[str, Any]:
    """What a run would need, stage by stage; and the peak of a lean one, where there is a choice."""
    from unclip_jax.compilation import use_compilation_cache
    from unclip_jax.pipelines.plan import plan

    use_compilation_cache()
    mesh, memory = mesh_of(args.devices, args.model_parallel), memory_of(args)
    given = (checkpoint, args.height, args.width, args.batch, args.dtype, mesh)
    stages = plan(*given, memory)
    facts: dict[str, Any] = {
        "mesh": dict(mesh.shape),
        "hosts": len({device.process_index for device in mesh.devices.flat}),
        "read": checkpoint.nbytes,
        "stages": {stage.name: {"weights": stage.weights, "activations": stage.activations} for stage in stages},
        "peak": _peak(stages),
    }
    if not memory.free_networks and stages[-1].weights > stages[0].weights:  # kernels were transformed
        facts["lean"] = _peak(plan(*given, dataclasses.replace(memory, convolution="direct")))
    return facts if args.json else _plan_lines(facts)


def _peak(stages: Sequence[Any]) -> dict[str, Any]:
    peak = max(stages, key=lambda stage: stage.peak)
    return {"stage": peak.name, "bytes": peak.peak}


def _plan_lines(facts: dict[str, Any]) -> dict[str, str]:
    width = max(map(len, facts["stages"]))
    axes = ", ".join(f"{size} along {axis}" for axis, size in facts["mesh"].items())
    hosts = "1 host, which reads" if facts["hosts"] == 1 else f"{facts['hosts']} hosts, each of which reads"
    lines = {"devices".ljust(width): f"{axes}; {hosts} {facts['read'] / 2**20:,.0f} MiB of weights once"}
    for name, stage in facts["stages"].items():
        weights, activations = stage["weights"] / 2**20, stage["activations"] / 2**20
        lines[name.ljust(width)] = (
            f"{weights + activations:8,.0f} MiB a device: {weights:,.0f} of weights, {activations:,.0f} beside them"
        )
    for key, name in (("peak", "peak"), ("lean", "with --lean")):
        if key in facts:
            lines[name.ljust(width)] = f"{facts[key]['bytes'] / 2**20:8,.0f} MiB, {facts[key]['stage']}"
    return lines


def _environment() -> dict[str, Any]:
    from importlib.metadata import version

    import jax

    packages = ("jax", "jaxlib", "flax", "numpy", "safetensors", "tokenizers", "pillow", "huggingface-hub")
    return {
        "versions": {"unclip_jax": __version__, "python": sys.version.split()[0], **{p: version(p) for p in packages}},
        "devices": [f"{d.platform}:{d.id} {d.device_kind}" for d in jax.devices()],
    }


def _lines(value: Any, indent: int = 0) -> list[str]:
    """A nested mapping as indented lines."""
    pad = "  " * indent
    lines: list[str] = []
    for key, item in value.items():
        if isinstance(item, dict) and item:
            lines += [f"{pad}{key}:", *_lines(item, indent + 1)]
        else:
            lines.append(f"{pad}{key}: {', '.join(map(str, item)) if isinstance(item, list | tuple) else item}")
    return lines


_COMMANDS = {
    **dict.fromkeys(COMMANDS, make),
    **dict.fromkeys(ESTIMATES, estimate),
    "info": info,
    "compile": compile_ahead,
    "train": train,
    "evaluate": evaluate,
}

if __name__ == "__main__":
    sys.exit(main())
