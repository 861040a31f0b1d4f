"""`unclip-jax ...`: a thin face over the Python API."""

import argparse
import hashlib
import json
import re
import resource
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unclip_jax import __version__
from unclip_jax.interruption import termination_interrupts
from unclip_jax.progress import one_line


def parser() -> argparse.ArgumentParser:
    """The command line. Built without importing JAX, so that --help answers at once."""
    p = argparse.ArgumentParser(prog="unclip-jax", description="Stable Diffusion 2.1 unCLIP in JAX.")
    p.add_argument("--version", action="version", version=f"unclip_jax {__version__}")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    v = commands.add_parser(
        "variations",
        help="make variations of pictures",
        description="Makes variations of pictures, or of their weighted mix; writes one PNG an image, with its recipe "
        "inside, and a contact sheet.",
    )
    v.add_argument("images", nargs="+", metavar="IMAGE", help="picture files")
    model = v.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="SRC",
        help="checkpoint file, diffusers folder, converted directory or hub id; default: the demo",
    )
    model.add_argument("--config", metavar="YAML", help="the original's yaml, for unpublished architectures")
    model.add_argument("--clip-stats", metavar="FILE", help="statistics of the image embeddings, for ViT-L checkpoints")
    model.add_argument("--variant", help="of a diffusers folder or hub id, such as fp16")
    model.add_argument("--preprocess", metavar="P", help="diffusers, original or original-kornia-0.6.0")
    model.add_argument(
        "--dtype", metavar="D", help="float32, bfloat16 or float16; default float32 on CPU, else bfloat16"
    )
    model.add_argument("--devices", type=int, metavar="N", help="how many local devices to use; default all")
    what = v.add_argument_group("what to make")
    what.add_argument("--prompt", default="", metavar="T", help="text that guides all variations")
    what.add_argument("--negative-prompt", default="", metavar="T", help="text to steer away from")
    what.add_argument(
        "--noise-level", type=int, nargs="+", default=[0], metavar="N", help="0..1000, one or one a picture"
    )
    what.add_argument("--weights", type=float, nargs="+", metavar="W", help="mix all pictures with these weights")
    what.add_argument("--mix-noise-level", type=int, metavar="N", help="noise the mix once more, 0..1000")
    what.add_argument("--num-images", type=int, default=1, metavar="N", help="variations a picture (or of the mix)")
    what.add_argument("--height", type=int, metavar="H", help="pixels; default the checkpoint's")
    what.add_argument("--width", type=int, metavar="W", help="pixels; default the checkpoint's")
    how = v.add_argument_group("how")
    how.add_argument("--steps", type=int, default=20, metavar="N", help="1..1000; default 20")
    how.add_argument("--guidance-scale", type=float, default=10.0, metavar="G", help="default 10")
    how.add_argument("--scheduler", metavar="S", help="solver; default the checkpoint's own")
    how.add_argument("--eta", type=float, default=0.0, metavar="E", help="0..1, how stochastic DDIM is")
    how.add_argument("--seed", type=int, default=0, metavar="K", help="0..2**32-1")
    how.add_argument("--batch-size", type=int, metavar="N", help="images at a time; default all")
    _add_memory(v)
    how.add_argument("--out", type=Path, default=Path("variations"), metavar="DIR", help="default ./variations")

    i = commands.add_parser("info", help="versions and devices; what a checkpoint is; a picture's recipe")
    i.add_argument(
        "source", nargs="?", metavar="SRC|PICTURE.png", help="a checkpoint, or a picture made by this program"
    )
    i.add_argument("--json", action="store_true", help="print JSON")
    for name in ("config", "clip_stats", "variant"):
        i.add_argument(f"--{name.replace('_', '-')}", metavar=name.upper(), help="as for variations")
    planned = i.add_argument_group("memory that a run would need", "compiles the programs, runs nothing")
    planned.add_argument("--plan", action="store_true", help="print each stage's peak on a device")
    planned.add_argument("--height", type=int, metavar="H", help="pixels; default the checkpoint's")
    planned.add_argument("--width", type=int, metavar="W", help="pixels; default the checkpoint's")
    planned.add_argument("--batch", type=int, default=1, metavar="N", help="images at a time; default 1")
    planned.add_argument("--dtype", metavar="D", help="as for variations")
    planned.add_argument("--devices", type=int, metavar="N", help="as for variations")
    _add_memory(i)

    t = commands.add_parser(
        "train",
        help="train or fine-tune a network",
        description="Trains by the settings in a YAML file: a UNet, an adapter (LoRA), a new word (textual inversion), "
        "an autoencoder, a CLIP model. A run that was interrupted goes on where it was. docs/training.md has the "
        "settings.",
    )
    t.add_argument("config", type=Path, metavar="CONFIG", help="the settings, a YAML file")
    t.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="instead of the file's, as run.total_steps=500"
    )
    _add_evaluate(commands)
    return p


def _add_evaluate(commands: Any) -> None:
    e = commands.add_parser(
        "evaluate",
        help="measure checkpoints: FID, CLIP-FID, CMMD, CLIP score, retention, diversity",
        description="Makes variations of pictures with their captions at several guidance scales, and without at "
        "several noise levels, and measures them as the model card does. Writes results.json, tables and plots. One "
        "that was interrupted goes on where it was.",
    )
    e.add_argument("models", nargs="*", metavar="MODEL", help="checkpoints; default the bundled one")
    e.add_argument("--pictures", required=True, metavar="DIR", help="an image folder, captions in its metadata")
    e.add_argument("--captions", type=Path, metavar="JSON", help="COCO's captions of these pictures instead")
    e.add_argument("--count", type=int, metavar="N", help="so many pictures; default all")
    e.add_argument("--clip", metavar="SRC", help="the CLIP model that judges; default the first checkpoint's own")
    e.add_argument(
        "--inception", type=Path, metavar="FILE", help="weights for FID, pt_inception-2015-12-05-6726825d.pth"
    )
    e.add_argument("--guidance-scale", type=float, nargs="*", metavar="G", help="default 1.5 2 3 4 5 6 7 8")
    e.add_argument("--noise-levels", type=int, nargs="*", metavar="N", help="default 0 200 400 600 800 1000")
    e.add_argument("--noise-level", type=int, default=0, metavar="N", help="of the pictures with prompts; default 0")
    e.add_argument("--level-guidance", type=float, default=3.0, metavar="G", help="at the noise levels; default 3")
    e.add_argument("--variations", type=int, default=4, metavar="N", help="a picture and noise level; default 4")
    e.add_argument("--steps", type=int, default=50, metavar="N", help="default 50")
    e.add_argument("--scheduler", default="ddim", metavar="S", help="default ddim")
    e.add_argument("--batch-size", type=int, default=8, metavar="N", help="pictures at a time; default 8")
    e.add_argument("--seed", type=int, default=0, metavar="K")
    e.add_argument("--dtype", metavar="D", help="as for variations")
    e.add_argument("--devices", type=int, metavar="N", help="as for variations")
    e.add_argument("--out", type=Path, default=Path("evaluation"), metavar="DIR", help="default ./evaluation")


def _add_memory(command: argparse.ArgumentParser) -> None:
    m = command.add_argument_group("to need less memory")
    m.add_argument("--decoding", default="whole", metavar="D", help="whole, seamless (half of the memory) or tiled")
    m.add_argument("--tile", type=int, metavar="N", help="of tiled, pixels along a side; default the checkpoint's")
    m.add_argument("--attention-chunk", type=int, metavar="N", help="queries at a time")
    m.add_argument("--free-networks", action="store_true", help="read each network for its stage, and let it go after")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 done, 2 for bad usage or bad input (one line on stderr), 1 for anything else."""
    args = parser().parse_args(argv)
    warnings.showwarning = lambda message, *rest, **more: print(f"unclip-jax: warning: {message}", file=sys.stderr)
    try:
        with termination_interrupts():
            _COMMANDS[args.command](args)
    except FloatingPointError as error:
        print(f"unclip-jax: {one_line(error)}", file=sys.stderr)
        return 1
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"unclip-jax: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("unclip-jax: interrupted", file=sys.stderr)
        return 1
    return 0


def variations(args: argparse.Namespace) -> None:
    """Makes the pictures and says where they are."""
    started = time.monotonic()
    for path in args.images:
        if not Path(path).is_file():
            raise FileNotFoundError(f"IMAGE: no such file: {path}")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file; want a directory")

    import jax

    from unclip_jax.conditioning.image import load_image
    from unclip_jax.pictures import contact_sheet, save_png
    from unclip_jax.pipelines.unclip import UnCLIPPipeline

    mesh, memory = _mesh(args.devices), _memory(args)
    pictures = [load_image(path) for path in args.images]
    given = {k: getattr(args, k) for k in ("config", "clip_stats", "variant", "preprocess")}
    overrides = {k: v for k, v in given.items() if v is not None}
    pipe = UnCLIPPipeline.from_pretrained(args.model, dtype=args.dtype, mesh=mesh, memory=memory, **overrides)
    levels = args.noise_level * len(pictures) if len(args.noise_level) == 1 else args.noise_level
    settings: dict[str, Any] = {
        "prompt": args.prompt,
        "negative_prompt": args.negative_prompt,
        "height": args.height,
        "width": args.width,
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "noise_level": levels,
        "num_images_per_prompt": args.num_images,
        "scheduler": args.scheduler,
        "eta": args.eta,
        "seed": args.seed,
        "image_weights": args.weights,
        "mix_noise_level": args.mix_noise_level,
    }
    images = pipe(image=pictures, batch_size=args.batch_size, **settings).images

    args.out.mkdir(parents=True, exist_ok=True)
    run = _next_run(args.out)
    sources = [{"name": Path(p).name, "sha256": hashlib.sha256(Path(p).read_bytes()).hexdigest()} for p in args.images]
    common = {
        **settings,
        "scheduler": args.scheduler or pipe.config.scheduler,
        "model": _name(args.model),
        "dtype": jax.numpy.dtype(pipe.dtype).name,
        "preprocess": pipe.config.preprocess,
        "version": __version__,
    }
    labelled = []
    for index, image in enumerate(images):
        mixed = args.weights is not None
        picture = None if mixed else index // args.num_images
        recipe = {**common, "index": index, "width": image.width, "height": image.height}
        recipe["images"] = sources if picture is None else [sources[picture]]
        recipe["noise_level"] = levels if picture is None else levels[picture]
        path = args.out / f"{run:04d}-{index:03d}.png"
        save_png(path, image, recipe)
        labelled.append((image, path.stem))
        print(path)
    sheet = contact_sheet([(p, Path(name).name) for p, name in zip(pictures, args.images, strict=True)], labelled)
    path = args.out / f"{run:04d}-sheet.png"
    save_png(path, sheet, {**common, "images": sources, "noise_level": levels})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 1024)
    seconds = time.monotonic() - started
    print(f"{path}\n{len(images)} images in {seconds:.1f} s, peak memory {peak:.0f} MiB")


def info(args: argparse.Namespace) -> None:
    """Prints versions and devices, and what `source` is."""
    if args.plan and args.source is None:
        raise ValueError("--plan: of which checkpoint? give SRC")
    facts: dict[str, Any] = {}
    if args.source is not None and args.source.lower().endswith((".png", ".jpg", ".jpeg", ".webp")):
        from unclip_jax.pictures import read_recipe

        facts["recipe"] = read_recipe(Path(args.source))
    elif args.source is not None:
        from unclip_jax.checkpoints.source import open_checkpoint

        with open_checkpoint(
            args.source, config=args.config, clip_stats=args.clip_stats, variant=args.variant
        ) as checkpoint:
            facts = {"plan": _plan(args, checkpoint)} if args.plan else {"checkpoint": checkpoint.describe()}
    else:
        facts = _environment()
    print(json.dumps(facts, indent=2, default=str) if args.json else "\n".join(_lines(facts)))


def train(args: argparse.Namespace) -> None:
    """Trains, and says what was made."""
    from unclip_jax.training.settings import read_settings
    from unclip_jax.training.tasks import run_training

    print(run_training(read_settings(args.config, args.set)))


def evaluate(args: argparse.Namespace) -> None:
    """Measures checkpoints, and says where the report is."""
    from unclip_jax.checkpoints.source import open_checkpoint
    from unclip_jax.evaluation.features import clip_features, inception_features
    from unclip_jax.evaluation.protocol import Judges, Protocol, coco_captions
    from unclip_jax.evaluation.protocol import evaluate as measure
    from unclip_jax.evaluation.report import write_report
    from unclip_jax.pipelines.unclip import UnCLIPPipeline
    from unclip_jax.training.data import image_folder

    folder = Path(args.pictures)
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
    mesh, models = _mesh(args.devices), args.models or [None]
    inception = None
    if args.inception is not None:
        from convert.inception import open_inception

        inception = inception_features(open_inception(args.inception), mesh, args.batch_size)
    names = (_name(args.clip or models[0]), *([] if args.inception is None else [_name(args.inception)]))
    with open_checkpoint(args.clip or models[0]) as checkpoint:
        judges = Judges(names, clip_features(checkpoint, mesh, args.batch_size), inception)
    results = []
    for model in models:
        pipe = UnCLIPPipeline.from_pretrained(model, dtype=args.dtype, mesh=mesh)
        pipe.progress = False
        results.append(measure(_name(model), pipe, records[: args.count], judges, protocol, args.out))
    print("\n".join(map(str, write_report(results, args.out))))


def _name(model: str | None) -> str:
    """What recipes and reports call a checkpoint: a file's or a folder's own name, a hub id, or the demo."""
    if model is None:
        return "the demo model"
    return Path(model).name if Path(model).exists() else model


def _mesh(count: int | None) -> Any:
    import jax

    from unclip_jax.distributed.mesh import local_mesh

    devices = jax.local_devices()
    if count is not None and not 1 <= count <= len(devices):
        raise ValueError(f"--devices {count}: this machine has {len(devices)} (1 to {len(devices)} accepted)")
    return local_mesh(devices[:count])


def _memory(args: argparse.Namespace) -> Any:
    from unclip_jax.pipelines.memory import Memory

    return Memory(args.decoding, args.tile, args.attention_chunk, args.free_networks)


def _plan(args: argparse.Namespace, checkpoint: Any) -> dict[str, Any]:
    """What a run would need, stage by stage."""
    from unclip_jax.compilation import use_compilation_cache
    from unclip_jax.pipelines.plan import plan

    use_compilation_cache()
    stages = plan(checkpoint, args.height, args.width, args.batch, args.dtype, _mesh(args.devices), _memory(args))
    if args.json:
        return {stage.name: {"weights": stage.weights, "activations": stage.activations} for stage in stages}
    width = max(len(stage.name) for stage in stages)
    lines = {
        stage.name.ljust(width): f"{stage.peak / 2**20:8,.0f} MiB a device: {stage.weights / 2**20:,.0f} of weights, "
        f"{stage.activations / 2**20:,.0f} beside them"
        for stage in stages
    }
    peak = max(stages, key=lambda stage: stage.peak)
    return {**lines, "peak".ljust(width): f"{peak.peak / 2**20:8,.0f} MiB, {peak.name}"}


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


def _next_run(folder: Path) -> int:
    """One more than the highest run number in a folder: earlier pictures are never overwritten."""
    runs = [int(m[1]) for p in folder.iterdir() if (m := re.match(r"(\d{4,})-(\d{3,}|sheet)\.png$", p.name))]
    return max(runs, default=0) + 1


_COMMANDS = {"variations": variations, "info": info, "train": train, "evaluate": evaluate}

if __name__ == "__main__":
    sys.exit(main())
