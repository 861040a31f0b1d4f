"""The commands that make images: `unclip-jax variations`, `text-to-image`, `image-to-image` and the rest.

Each has the arguments of its pipeline, and writes one PNG per image, with its recipe inside, and a contact sheet.
"""

import argparse
import hashlib
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

from unclip_jax import __version__
from unclip_jax.cli_bulk import add_rows, make_rows
from unclip_jax.cli_controlnet import add_controls, check_controls, open_controls, scales_of
from unclip_jax.conditioning.address import fetch, is_address, shown
from unclip_jax.pipelines.arguments import (
    CommonArguments,
    ControlArguments,
    DepthToImageArguments,
    ImageToImageArguments,
    InpaintArguments,
    StableUnCLIPArguments,
    TextToImageArguments,
    UnCLIPArguments,
    UpscaleArguments,
)
from unclip_jax.pipelines.defaults import default, with_own_defaults
from unclip_jax.pipelines.instruct_arguments import InstructArguments


class Command(NamedTuple):
    """pipeline: the class in `unclip_jax`. arguments: of its call. help: what it does. inputs: "images", "prompts"."""

    pipeline: str
    arguments: type[CommonArguments]
    help: str
    inputs: str

    def default(self, name: str) -> Any:
        """The default of an argument of the call."""
        return default(self.arguments, name)


COMMANDS = {
    "variations": Command("UnCLIPPipeline", UnCLIPArguments, "make variations of images", "images"),
    "text-to-image": Command("TextToImagePipeline", TextToImageArguments, "make images of prompts", "prompts"),
    "image-to-image": Command("ImageToImagePipeline", ImageToImageArguments, "change images by a prompt", "images"),
    "depth-to-image": Command(
        "DepthToImagePipeline", DepthToImageArguments, "change images, but not their depth", "images"
    ),
    "inpaint": Command("InpaintPipeline", InpaintArguments, "repaint the white part of a mask", "images"),
    "upscale": Command("UpscalePipeline", UpscaleArguments, "make images four times as large", "images"),
    "instruct": Command("InstructPipeline", InstructArguments, "change images by an instruction", "images"),
}
# Options that only some commands have: name -> the commands, and what argparse is told.
OPTIONS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "noise-level": (
        ("variations", "text-to-image", "image-to-image", "inpaint", "upscale"),
        {"type": int, "nargs": "+", "metavar": "N", "help": "0..1000 (upscale: 0..350), one for all or one per image"},
    ),
    "weights": (
        ("variations",),
        {"type": float, "nargs": "+", "metavar": "W", "help": "mixing weights, one per image"},
    ),
    "mix-noise-level": (("variations",), {"type": int, "metavar": "N", "help": "noise the mix once more, 0..1000"}),
    "strength": (
        ("image-to-image", "depth-to-image", "inpaint"),
        {"type": float, "metavar": "S", "help": "0..1, the share of the steps that are run"},
    ),
    "depth-map": (("depth-to-image",), {"metavar": "FILE", "help": "a gray image, white is near; one for all"}),
    "mask": (("inpaint",), {"metavar": "FILE", "required": True, "help": "white is repainted; one for all images"}),
    "padding-mask-crop": (
        ("inpaint",),
        {
            "type": int,
            "metavar": "N",
            "help": "repaint only the part around the mask and N pixels more",
        },
    ),
    "paste-back": (("inpaint",), {"action": "store_true", "help": "keep what is black in the mask, bit for bit"}),
    "condition-image": (("inpaint",), {"metavar": "FILE", "help": "guides an unCLIP checkpoint; default IMAGE"}),
    "image-guidance-scale": (
        ("instruct",),
        {
            "type": float,
            "metavar": "G",
            "help": "1 or more, how near the image stays to IMAGE; default "
            f"{default(InstructArguments, 'image_guidance_scale')}",
        },
    ),
    "height": (
        ("variations", "text-to-image", "image-to-image", "depth-to-image", "inpaint", "instruct"),
        {"type": int, "metavar": "H", "help": "pixels; default the checkpoint's, or the image's"},
    ),
    "width": (
        ("variations", "text-to-image", "image-to-image", "depth-to-image", "inpaint", "instruct"),
        {"type": int, "metavar": "W", "help": "pixels; default the checkpoint's, or the image's"},
    ),
}
# Options that open the checkpoint, named as the arguments of `unclip_jax.checkpoints.source.open_checkpoint`.
OPENING = ("config", "prediction_type", "clip_stats", "vae", "unet", "variant", "revision", "subfolder", "preprocess")
# Of the command line -> of the pipelines.
ARGUMENTS = {"steps": "num_inference_steps", "num_images": "num_images_per_prompt", "weights": "image_weights"}
ARGUMENTS |= {"mask": "mask_image"}
IMAGES = ("mask_image", "depth_map", "condition_image")  # of the pipelines, beside `image`


def add_commands(commands: Any) -> None:
    """Adds the commands to argparse's."""
    for name, command in COMMANDS.items():
        p = commands.add_parser(
            name,
            help=command.help,
            description=f"To {command.help}. Writes one PNG per image, with its recipe inside, and a contact sheet.",
        )
        if command.inputs == "images":
            p.add_argument("images", nargs="*", metavar="IMAGE", help="image files, or their addresses (http, https)")
        else:
            p.add_argument("prompts", nargs="*", metavar="PROMPT", help="texts")
        model = add_model(p)
        if name == "text-to-image":
            model.add_argument("--prior", metavar="SRC", help="a text-to-embedding prior, for an unCLIP checkpoint")
        if name == "variations":
            model.add_argument("--preprocess", metavar="P", help="diffusers, original or original-kornia-0.6.0")
        add_hosts(model)
        model.add_argument("--executables", metavar="DIR", help="of `unclip-jax compile`, trusted; default beside SRC")
        model.add_argument(
            "--model-parallel", type=int, default=1, metavar="N", help="devices that share one image's work; default 1"
        )
        what = p.add_argument_group("what to make")
        if command.inputs == "images":
            what.add_argument("--prompt", default="", metavar="T", help="text that guides")
        what.add_argument("--negative-prompt", default="", metavar="T", help="text to steer away from")
        what.add_argument(
            "--num-images",
            type=int,
            default=default(command.arguments, "num_images_per_prompt"),
            metavar="N",
            help="images of each input; default 1",
        )
        for option, (names, settings) in OPTIONS.items():
            if name in names:
                what.add_argument(f"--{option}", **settings)
        if issubclass(command.arguments, ControlArguments):
            add_controls(p)
        how = p.add_argument_group("how")
        steps = f"1..1000; default {command.default('num_inference_steps')}"
        scale = f"default {command.default('guidance_scale')}"
        if name == "text-to-image":
            steps += f", with --prior {default(StableUnCLIPArguments, 'num_inference_steps')}"
            scale += f", with --prior {default(StableUnCLIPArguments, 'guidance_scale')}"
        if name in ("text-to-image", "image-to-image", "inpaint"):
            steps, scale = f"{steps}, of sd-turbo as few as there can be", f"{scale}, of sd-turbo none"
        how.add_argument("--steps", type=int, metavar="N", help=steps)
        how.add_argument("--guidance-scale", type=float, metavar="G", help=scale)
        how.add_argument("--guidance-rescale", type=float, metavar="R", help="0..1, against overexposure")
        how.add_argument(
            "--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="of noise levels, in sigma"
        )
        how.add_argument("--pag-scale", type=float, metavar="G", help="of perturbed-attention guidance")
        how.add_argument("--deep-cache", type=int, metavar="N", help="run the whole UNet every N steps only; default 1")
        how.add_argument("--scheduler", metavar="S", help="solver; default the checkpoint's own")
        how.add_argument("--eta", type=float, default=0.0, metavar="E", help="0..1, how stochastic DDIM is")
        how.add_argument("--seed", type=int, default=default(command.arguments, "seed"), metavar="K", help="0..2**32-1")
        how.add_argument("--batch-size", type=int, metavar="N", help="images at a time; default all")
        adapt = p.add_argument_group("adapters and marks")
        adapt.add_argument(
            "--lora", nargs="+", default=[], metavar="FILE[=W]", help="LoRA files, folders or hub ids, and weights"
        )
        adapt.add_argument(
            "--textual-inversion",
            nargs="+",
            default=[],
            metavar="FILE[=WORD]",
            help="textual inversion embeddings: files, folders or hub ids, and the word for each",
        )
        adapt.add_argument("--freeu", type=float, nargs=4, metavar=("S1", "S2", "B1", "B2"), help="reweight the UNet")
        adapt.add_argument("--watermark", action="store_true", help="mark the images invisibly, as the original does")
        adapt.add_argument("--safety-checker", metavar="DIR", help="black out images that diffusers' checker flags")
        add_memory(p)
        add_rows(p)
        how.add_argument("--out", type=Path, default=Path(name), metavar="DIR", help=f"default ./{name}")


def add_model(command: argparse.ArgumentParser) -> Any:
    """Adds the options that say which checkpoint is opened, and on what: their group."""
    model = command.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="SRC",
        help="checkpoint file, diffusers folder or converted directory; on the hub: owner/name, owner/name/FILE, "
        "or an address; default: the demo",
    )
    model.add_argument("--revision", help="of a hub id: branch, tag or commit")
    model.add_argument("--subfolder", metavar="DIR", help="where in SRC the checkpoint is")
    model.add_argument("--config", metavar="YAML", help="the original's yaml, for unpublished architectures")
    model.add_argument("--prediction-type", metavar="P", help="what the UNet predicts: epsilon or v_prediction")
    model.add_argument("--vae", metavar="SRC", help="another VAE than the checkpoint's: file, folder or hub id")
    model.add_argument("--unet", metavar="SRC", help="another UNet than the checkpoint's: file, folder or hub id")
    model.add_argument("--clip-stats", metavar="FILE", help="statistics of image embeddings, for ViT-L checkpoints")
    model.add_argument("--variant", help="of a diffusers folder or hub id, such as fp16")
    model.add_argument(
        "--dtype", metavar="D", help="float32, bfloat16 or float16; default float32 on CPU, else bfloat16"
    )
    model.add_argument("--devices", type=int, metavar="N", help="number of devices to use; default all")
    return model


def add_memory(command: argparse.ArgumentParser) -> None:
    """Adds the options of `unclip_jax.pipelines.memory.Memory`."""
    m = command.add_argument_group("to need less memory")
    m.add_argument("--decoding", default="whole", metavar="D", help="whole, seamless (half of the memory) or tiled")
    m.add_argument("--tile", type=int, metavar="N", help="of tiled, pixels along a side; default the checkpoint's")
    m.add_argument("--attention-chunk", type=int, metavar="N", help="queries at a time")
    m.add_argument("--free-networks", action="store_true", help="read each network for its stage and free it after")
    m.add_argument("--shard-weights", action="store_true", help="split every weight over all devices")
    m.add_argument("--lean", action="store_true", help="hold no second, faster form of the kernels (CPUs)")


def add_hosts(command: Any) -> None:
    """Adds the options of `unclip_jax.distributed.join`, for `join_hosts`."""
    command.add_argument(
        "--distributed",
        action="store_true",
        help="join the processes of other hosts, which run the same command; JAX finds them on Cloud TPU, SLURM, "
        "Kubernetes and Open MPI",
    )
    command.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, where JAX finds nothing")
    command.add_argument("--num-processes", type=int, metavar="N", help="how many processes there are")
    command.add_argument("--process-id", type=int, metavar="I", help="which of them this is, from 0")


def join_hosts(args: argparse.Namespace) -> None:
    """Joins the other hosts' processes, if the options of `add_hosts` say so; before anything else of JAX."""
    given = args.coordinator, args.num_processes, args.process_id
    if args.distributed or given != (None, None, None):
        from unclip_jax.distributed.hosts import join

        join(*given)


def make(args: argparse.Namespace) -> None:
    """Makes the images and prints their paths."""
    started = time.monotonic()
    command = COMMANDS[args.command]
    paths = getattr(args, "images", [])
    inputs_given = paths or getattr(args, "prompts", [])
    if bool(inputs_given) == (args.rows is not None):
        found = "both" if inputs_given else "neither"
        raise ValueError(f"give {'IMAGE' if command.inputs == 'images' else 'PROMPT'}s or --from INPUT, got {found}")
    if args.engine is not None and args.rows is None:
        raise ValueError("--engine is of bulk jobs: give --from INPUT, too")
    if args.engine is not None and args.distributed:
        raise ValueError("--engine ray or --distributed, not both: on a cluster, Ray starts the processes")
    hints: list[str] = getattr(args, "control_image", None) or []
    others = [path for name in ("mask", "depth_map", "condition_image") if (path := getattr(args, name, None))]
    others += hints
    for path in (*paths, *others):
        if not is_address(path) and not Path(path).is_file():
            raise FileNotFoundError(f"{'IMAGE' if path in paths else 'FILE'}: no such file: {path}")
    if issubclass(command.arguments, ControlArguments):
        check_controls(args)
    if args.command == "text-to-image" and args.prior is None and args.noise_level is not None:
        raise ValueError("--noise-level is of a prior's embeddings: give --prior, too")
    arguments = command.arguments if getattr(args, "prior", None) is None else StableUnCLIPArguments
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file; want a directory")

    join_hosts(args)
    if args.rows is not None:
        make_rows(args, open_pipeline, _settings(args, None))
        return

    import jax

    from unclip_jax.distributed.hosts import each
    from unclip_jax.image_files import contact_sheet, save_png

    # Opened once, and as they are: what becomes of transparency, or of 16 bits, is the pipeline's to say.
    opened = {path: open_file(path) for path in dict.fromkeys((*paths, *others))}
    loaded = [opened[path].image for path in paths]
    pipe = open_pipeline(args)
    names = {"steps": "num_inference_steps", "guidance_scale": "guidance_scale"}
    for option, name in names.items():
        if getattr(args, option) is None:
            setattr(args, option, default(arguments, name))
    settings = _settings(args, max(1, len(paths)))
    call = with_own_defaults(arguments(**settings), pipe.config.distilled)
    settings |= {name: getattr(call, name) for name in names.values()}
    inputs = {"image": loaded} if paths else {}
    inputs |= {name: opened[path].image for name in IMAGES if (path := settings.get(name)) is not None}
    if hints:
        inputs |= open_controls(args, pipe, [opened[path].image for path in hints])
    out = pipe(**{**settings, **inputs}, batch_size=args.batch_size)

    args.out.mkdir(parents=True, exist_ok=True)
    run = max(each(next_run(args.out)))
    sources = [opened[path].origin for path in paths]
    common = {
        "command": args.command,
        **{k: opened[v].origin if k in IMAGES else v for k, v in settings.items()},
        "scheduler": args.scheduler or pipe.config.scheduler,
        "model": model_name(args.model),
        **({"prior": model_name(args.prior)} if getattr(args, "prior", None) else {}),
        **{name: getattr(args, name) for name in ("lora", "textual_inversion", "freeu") if getattr(args, name)},
        **({"controlnet": [model_name(source) for source in args.controlnet]} if hints else {}),
        **({"control_image": [opened[path].origin for path in hints]} if hints else {}),
        "dtype": jax.numpy.dtype(pipe.dtype).name,
        "preprocess": pipe.config.preprocess,
        "version": __version__,
    }
    per_image = {k: v for k, v in settings.items() if k in ("noise_level", "prompt") and isinstance(v, list)}
    labelled = []
    for index, image in zip(out.rows.tolist(), out.images, strict=True):
        # Which input an image was made of; all of them, when they were mixed.
        source = None if settings.get("image_weights") is not None else index // args.num_images
        recipe = {**common, "index": index, "width": image.width, "height": image.height}
        if sources:
            recipe["images"] = sources if source is None else [sources[source]]
        if source is not None:
            recipe |= {name: values[source] for name, values in per_image.items()}
        path = args.out / f"{run:04d}-{index:03d}.png"
        save_png(path, image, recipe)
        labelled.append((image, path.stem))
        print(path)
    if jax.process_count() == 1:  # else no host has all images
        labels = [source["name"].rpartition("/")[2] for source in sources]
        sheet = contact_sheet(list(zip(loaded, labels, strict=True)), labelled)
        path = args.out / f"{run:04d}-sheet.png"
        save_png(path, sheet, {**common, **({"images": sources} if sources else {})})
        print(path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 1024)
    seconds = time.monotonic() - started
    print(f"{len(labelled)} images in {seconds:.1f} s, peak memory {peak:.0f} MiB")


def open_pipeline(args: argparse.Namespace) -> Any:
    """The pipeline of a command, with its adapters and marks."""
    import unclip_jax

    given = {k: getattr(args, k, None) for k in (*OPENING, "executables")}
    overrides = {k: v for k, v in given.items() if v is not None}
    # Of many rows each host makes its own.
    mesh = mesh_of(args.devices, args.model_parallel, own=args.rows is not None)
    opening = {"dtype": args.dtype, "mesh": mesh, "memory": memory_of(args), **overrides}
    pipe: Any
    if getattr(args, "prior", None) is not None:
        pipe = unclip_jax.StableUnCLIPPipeline.from_pretrained(args.model, prior=args.prior, **opening)
    else:
        pipe = getattr(unclip_jax, COMMANDS[args.command].pipeline).from_pretrained(args.model, **opening)
    _adapt(pipe, args)
    return pipe


def mesh_of(count: int | None, model: int = 1, own: bool = False) -> Any:
    """A mesh of this many devices, or all, of all hosts that joined; `model` of them share the weights.

    own: this host's devices alone. Raises ValueError for more than there are.
    """
    import jax

    from unclip_jax.distributed.mesh import local_mesh

    devices = jax.local_devices() if own else jax.devices()
    if count is not None and not 1 <= count <= len(devices):
        raise ValueError(f"--devices {count}: there are {len(devices)} (1 to {len(devices)} accepted)")
    return local_mesh(devices[:count], model)


def memory_of(args: argparse.Namespace) -> Any:
    """The options of `add_memory`."""
    from unclip_jax.pipelines.memory import Memory

    convolution: Literal["direct"] | None = "direct" if args.lean else None
    return Memory(args.decoding, args.tile, args.attention_chunk, args.free_networks, convolution, args.shard_weights)


def model_name(model: str | None) -> str:
    """A checkpoint's name in recipes and reports: a file's or a folder's own name, a hub id, or the demo."""
    if model is None:
        return "the demo model"
    return Path(model).name if Path(model).exists() else shown(model)


def _adapt(pipe: Any, args: argparse.Namespace) -> None:
    """Loads the adapters, and sets what is done to finished images."""
    for given in args.lora:
        file, _, weight = given.rpartition("=") if re.search(r"=-?(\d+\.?\d*|\.\d+)$", given) else (given, "", "1")
        pipe.load_lora_weights(file, adapter_name=given, weight=float(weight))
    for given in args.textual_inversion:
        file, _, word = (given, "", "") if Path(given).exists() else given.partition("=")
        pipe.load_textual_inversion(file, word or None)
    if args.freeu is not None:
        from unclip_jax.models.freeu import FreeU

        pipe.freeu = FreeU(*args.freeu)
    if args.watermark:
        from unclip_jax.watermark import MARK

        pipe.watermark = MARK
    if args.safety_checker is not None:
        from unclip_jax.checkpoints.foreign import open_safety_checker

        pipe.safety_checker = open_safety_checker(args.safety_checker)


def _settings(args: argparse.Namespace, images: int | None) -> dict[str, Any]:
    """The arguments of the call: those that every recipe shows, and what else was given.

    images: how many; None: of the calls for rows, which say what is each one's own.
    """
    shown = ["negative_prompt", "steps", "guidance_scale", "num_images", "scheduler", "eta", "seed"]
    levels = getattr(args, "noise_level", None) or []
    if args.command == "variations":
        shown += ["height", "width", "weights", "mix_noise_level"]
        levels = levels or [0]
    if len(levels) == 1:
        args.noise_level = levels * images if args.command == "variations" and images is not None else levels[0]
    elif levels and images is None:
        raise ValueError("--noise-level has several values; with --from it is one for all, or a column")
    optional = [
        "guidance_rescale",
        "guidance_interval",
        "pag_scale",
        "deep_cache",
        *(name.replace("-", "_") for name in OPTIONS),
    ]
    # 0 is a value, and not the absence of one.
    given = [name for name in optional if (value := getattr(args, name, None)) is not None and value is not False]
    settings: dict[str, Any] = {"prompt": args.prompts if args.command == "text-to-image" else args.prompt}
    if images is None:
        settings["prompt"] = getattr(args, "prompt", "")
    elif images > 1 and args.command not in ("variations", "text-to-image"):
        settings["prompt"] = args.prompt  # one for all
    for name in dict.fromkeys([*shown, *given]):
        settings[ARGUMENTS.get(name, name)] = getattr(args, name)
    return settings | (scales_of(args) if issubclass(COMMANDS[args.command].arguments, ControlArguments) else {})


class Opened(NamedTuple):
    """An image, and the facts about its file that go into recipes."""

    image: Any
    origin: dict[str, str]


def open_file(path: str) -> Opened:
    """An image at a path or an address."""
    from unclip_jax.conditioning.clip_image import open_image

    name = shown(path) if is_address(path) else path
    content = fetch(path) if is_address(path) else Path(path).read_bytes()
    origin = {"name": name if is_address(path) else Path(path).name, "sha256": hashlib.sha256(content).hexdigest()}
    return Opened(open_image(content, f"image {name!r}"), origin)


def next_run(folder: Path) -> int:
    """One more than the highest run number in a folder: earlier images are never overwritten."""
    runs = [int(m[1]) for p in folder.iterdir() if (m := re.match(r"(\d{4,})-(\d{3,}|sheet)\.png$", p.name))]
    return max(runs, default=0) + 1
