"""The evaluation of the model card, and unCLIP's own, for one or more checkpoints.

By guidance: variations of every image with its caption as the prompt, 50 DDIM steps, guidance 1.5, 2 to 8. For each
guidance: the Fréchet distances and CMMD to the images themselves, and the CLIP score of images and captions. By noise
level: variations without a prompt; how much they keep of their source, and how much they differ.

Statistics are written after every batch, so an interrupted evaluation resumes where it stopped.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from unclip_jax.checkpoints.atomic import replaced_file, write_json
from unclip_jax.dataset_files import points_outside
from unclip_jax.evaluation.cmmd import cmmd
from unclip_jax.evaluation.features import ClipFeatures, Images
from unclip_jax.evaluation.frechet import Moments, frechet_distance, merge, moments, no_moments
from unclip_jax.evaluation.similarity import cosines, diversity
from unclip_jax.pipelines.unclip import UnCLIPPipeline
from unclip_jax.progress import Progress
from unclip_jax.sampling.noise import Branch, draw, image_keys
from unclip_jax.training.data import Record, load_rgb
from unclip_jax.training.transforms import square

GUIDANCE_SCALES = (1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)  # the model card's
NOISE_LEVELS = (0, 200, 400, 600, 800, 1000)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What is measured.

    Args:
        guidance_scales: The scales to compare.
        noise_levels: The noise levels to compare.
        scheduler: The solver.
        steps: Its number of steps.
        noise_level: Of the images with prompts.
        level_guidance: The guidance scale of the variations without prompts.
        variations: The number of variations without a prompt, per image and noise level.
        seed: The seed.
        batch_size: Images made at a time.

    Raises:
        ValueError: A number is out of range.
    """

    guidance_scales: tuple[float, ...] = GUIDANCE_SCALES
    noise_levels: tuple[int, ...] = NOISE_LEVELS
    scheduler: str = "ddim"
    steps: int = 50
    noise_level: int = 0
    level_guidance: float = 3.0
    variations: int = 4
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.variations < 2 or self.batch_size < 1 or self.steps < 1:
            raise ValueError(
                f"variations {self.variations}, batch_size {self.batch_size}, steps {self.steps}: "
                "want at least 2, 1 and 1"
            )


@dataclasses.dataclass(frozen=True)
class Judges:
    """The networks that judge the images.

    Args:
        names: What distinguishes them from other judges.
        clip: A CLIP model.
        inception: Inception's features, or None for no FID.
    """

    names: tuple[str, ...]
    clip: ClipFeatures
    inception: Callable[[Images], NDArray[np.float32]] | None = None


@dataclasses.dataclass
class Counts:
    """The statistics of one setting; see `unclip_jax.evaluation.frechet.Moments` for the moments."""

    done: int
    clip: Moments
    inception: Moments
    embeddings: NDArray[np.float32]
    clip_score: float = 0.0
    retention: float = 0.0
    diversity: float = 0.0


def coco_captions(path: Path, folder: Path) -> list[Record]:
    """The images of a COCO captions file, in the order of their ids, each with its first caption.

    Args:
        path: The captions file.
        folder: The folder of the images.

    Returns:
        The images with their captions.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is a file of another kind.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"captions: no such file: {path}")
    try:
        data = json.loads(Path(path).read_text("utf-8"))
        names = {image["id"]: image["file_name"] for image in data["images"]}
        captions: dict[int, str] = {}
        for annotation in sorted(data["annotations"], key=lambda a: a["id"]):
            captions.setdefault(annotation["image_id"], annotation["caption"].strip())
        outside = [name for name in names.values() if points_outside(name)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{Path(path).name}: not COCO's captions: {error!r}") from error
    if outside:
        raise ValueError(f"{Path(path).name}: file_name {outside[0]!r} points outside the folder")
    return [Record(Path(folder) / names[i], captions[i], {}) for i in sorted(names) if i in captions]


def evaluate(
    name: str, pipe: UnCLIPPipeline, records: Sequence[Record], judges: Judges, protocol: Protocol, folder: Path
) -> dict[str, Any]:
    """Evaluates one checkpoint.

    Args:
        name: The checkpoint's name in the results.
        pipe: Its pipeline.
        records: Images with their captions.
        judges: The judges.
        protocol: What is measured.
        folder: Where statistics are kept, separately for other images, judges and protocols.

    Returns:
        JSON types: "guidance" and "noise_level", lists of rows.
    """
    side = pipe.config.unet.sample_size * pipe.config.vae.factor
    facts = {
        "model": name,
        "judges": list(judges.names),
        "images": _digest(str(record) + record.text for record in records),
        **{k: v for k, v in dataclasses.asdict(protocol).items() if k in ("scheduler", "steps", "noise_level", "seed")},
    }
    state = _States(Path(folder) / "counted" / _digest([json.dumps(facts, sort_keys=True)])[:16], facts)
    reference = _count(state, "reference", records, protocol, judges, side, lambda batch, sources, indices: sources)

    def make(guidance: float, level: int, prompted: bool, copies: int) -> Any:
        def made(batch: Sequence[Record], sources: Images, indices: NDArray[np.int64]) -> Images:
            outputs = (indices[:, None] * copies + np.arange(copies)).ravel()  # an image's index in the whole run
            keys = image_keys(protocol.seed, jnp.asarray(outputs))
            width = pipe.config.image_encoder.projection_dim if pipe.config.image_encoder is not None else 0
            latents = (pipe.config.unet.sample_size,) * 2 + (pipe.config.vae.latent_channels,)
            images = pipe(
                image=list(sources),
                prompt=[record.text if prompted else "" for record in batch],
                noise_level=level,
                guidance_scale=guidance,
                num_inference_steps=protocol.steps,
                num_images_per_prompt=copies,
                scheduler=protocol.scheduler,
                latents=np.asarray(draw(keys, Branch.LATENTS, latents)),
                image_noise=np.asarray(draw(keys, Branch.IMAGE, (width,), 0)),
            ).images
            return [np.asarray(image) for image in images]

        return made

    by_guidance = []
    for guidance in protocol.guidance_scales:
        counts = _count(
            state,
            f"guidance-{guidance:g}",
            records,
            protocol,
            judges,
            side,
            make(guidance, protocol.noise_level, True, 1),
        )
        row = {"guidance_scale": guidance, "clip_score": counts.clip_score / counts.done}
        row["retention"] = counts.retention / counts.done
        row["clip_fid"] = frechet_distance(reference.clip, counts.clip)
        row["cmmd"] = cmmd(reference.embeddings, counts.embeddings)
        if judges.inception is not None:
            row["fid"] = frechet_distance(reference.inception, counts.inception)
        by_guidance.append(row)
    by_level = []
    for level in protocol.noise_levels:
        counts = _count(
            state,
            f"level-{level}-{protocol.level_guidance:g}-{protocol.variations}",
            records,
            protocol,
            judges,
            side,
            make(protocol.level_guidance, level, False, protocol.variations),
        )
        row = {"noise_level": level, "retention": counts.retention / counts.done}
        row["diversity"] = counts.diversity / counts.done
        by_level.append(row)
    return {**facts, "count": len(records), "guidance": by_guidance, "by_noise_level": by_level}


def _count(
    state: "_States",
    name: str,
    records: Sequence[Record],
    protocol: Protocol,
    judges: Judges,
    side: int,
    make: Callable[[Sequence[Record], Images, NDArray[np.int64]], Images],
) -> Counts:
    """Generates the images of one setting and updates its statistics, from where it was interrupted."""
    counts = state.read(name)
    with Progress(name.replace("-", " "), len(records), unit="image") as bar:
        bar.update(counts.done)
        while counts.done < len(records):
            batch = records[counts.done : counts.done + protocol.batch_size]
            indices = np.arange(counts.done, counts.done + len(batch))
            sources = [square(load_rgb(record), side, "center", np.random.default_rng(0)) for record in batch]
            made = make(batch, sources, indices)
            seen, copies = judges.clip.images(made), len(made) // len(batch)
            source = np.repeat(judges.clip.images(sources), copies, axis=0)
            texts = np.repeat(judges.clip.texts([record.text for record in batch]), copies, axis=0)
            counts.retention += float(cosines(seen, source).sum()) / copies
            counts.clip_score += float(cosines(seen, texts).sum()) / copies
            if copies > 1:
                counts.diversity += sum(diversity(part) for part in seen.reshape(len(batch), copies, -1))
            counts.clip = merge(counts.clip, moments(seen)) if counts.done else moments(seen)
            counts.embeddings = np.concatenate([counts.embeddings, seen]) if counts.done else seen
            if judges.inception is not None:
                features = moments(judges.inception(made))
                counts.inception = merge(counts.inception, features) if counts.done else features
            counts.done += len(batch)
            state.write(name, counts)
            bar.update(len(batch))
    return counts


class _States:
    """Statistics on the disk, one file per setting."""

    def __init__(self, folder: Path, facts: Mapping[str, Any]):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "facts.json", facts)

    def read(self, name: str) -> Counts:
        path = self.folder / f"{name}.npz"
        if not path.exists():
            return Counts(0, no_moments(1), no_moments(1), np.zeros((0, 1), np.float32))
        with np.load(path, allow_pickle=False) as a:
            clip, inception = (
                Moments(int(a[f"{n}_size"]), a[f"{n}_mean"], a[f"{n}_scatter"]) for n in ("clip", "inception")
            )
            sums = {n: float(a[n]) for n in ("clip_score", "retention", "diversity")}
            return Counts(int(a["done"]), clip, inception, a["embeddings"], **sums)

    def write(self, name: str, counts: Counts) -> None:
        arrays: dict[str, Any] = {"done": counts.done, "embeddings": counts.embeddings}
        arrays |= {n: getattr(counts, n) for n in ("clip_score", "retention", "diversity")}
        for part, m in (("clip", counts.clip), ("inception", counts.inception)):
            arrays |= {f"{part}_size": m.size, f"{part}_mean": m.mean, f"{part}_scatter": m.scatter}
        with replaced_file(self.folder / f"{name}.npz") as partial, open(partial, "wb") as file:
            np.savez(file, **arrays)


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
