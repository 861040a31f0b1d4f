"""Bulk jobs on a Ray cluster: the parts of a job are rows of Ray Data, and each of its actors holds a pipeline.

Ray Data streams the parts, holds them back where actors are busy, starts actors anew that died, and grows and shrinks
their number. A part's files do not depend on who makes them, so a job may begin on one machine and go on here.
"""

import itertools
import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from unclip_jax.bulk import manifest
from unclip_jax.bulk.batches import Part, parts
from unclip_jax.bulk.engine import Counts, Summary, make_parts, refuse_errors
from unclip_jax.bulk.inputs import read_rows
from unclip_jax.bulk.job import Format, begin, describe
from unclip_jax.bulk.store import Store, open_store
from unclip_jax.conditioning.address import shown
from unclip_jax.pipelines.pipeline import Pipeline
from unclip_jax.progress import Progress

# Parts that the driver holds: so many are given to Ray Data at once.
PARTS_AT_ONCE = 1000


class PartMaker:
    """An actor: a pipeline, its job, and the store that it writes to."""

    def __init__(self, open_pipeline: Callable[[], Pipeline], out: str, options: Mapping[str, Any]):
        self.pipe = open_pipeline()
        self.pipe.progress = False
        settings = options["settings"]
        self.job = describe(self.pipe, settings, **{name: options[name] for name in options if name != "settings"})
        self.store = open_store(out)
        begin(self.store, self.job)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Makes a part. Returns what `Counts` has."""
        counts = Counts()

        def told(now: Counts, note: str) -> None:
            nonlocal counts
            counts = now

        make_parts(self.pipe, self.job, self.store, [pickle.loads(row["part"])], told=told)
        return {"rows": counts.rows, "images": counts.images, "failed": counts.failed, "reason": counts.reason}


def run_on_ray(
    open_pipeline: Callable[[], Pipeline],
    rows: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    address: str | None = None,
    workers: int | tuple[int, int] = 1,
    resources: Mapping[str, Any] | None = None,
    save: Format = "png",
    shards: bool = False,
    batch_size: int = 8,
    part_size: int = 1024,
    names: Mapping[str, str] | None = None,
    max_errors: int | None = None,
    progress: bool = True,
    **settings: Any,
) -> Summary:
    """`unclip_jax.bulk.run` on a Ray cluster. It makes the same files.

    Args:
        open_pipeline: Opens the pipeline, in every actor. It is sent there, as a function of a module is.
        rows: As for `run`; read by this process. Pictures are read by the actors: they have to be where all reach them.
        out: As for `run`, where all reach it.
        address: Of the cluster, "auto" or "ray://...". None: `RAY_ADDRESS`, or a cluster on this machine.
        workers: How many actors, or the least and the most.
        resources: Of an actor: {"num_gpus": 1}, {"num_cpus": 8}, {"resources": {"TPU": 4}}. None: one core.
        save, shards, batch_size, part_size, names, max_errors, **settings: As for `run`.
        progress: Show how far it is.

    Returns:
        What was made. The rate is that of all actors, with their starts; idle time is not known.

    Raises:
        ImportError: Ray is not installed.
        ValueError, FileNotFoundError, OSError: As for `run`.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(f"a job on a cluster needs Ray: pip install 'unclip-jax[ray]' ({error})") from error
    ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
    source, place, own = shown(os.fspath(rows)), open_store(out).address, dict(resources or {"num_cpus": 1})
    options: dict[str, Any] = {
        "save": save,
        "shards": shards,
        "batch_size": batch_size,
        "part_size": part_size,
        "source": source,
    }
    options |= {"names": dict(names or {}), "settings": settings}
    # Refused here, by one task, and not by every actor.
    arguments = ray.get(ray.remote(_begun).options(**own).remote(open_pipeline, place, options))
    counts, started = Counts(), time.monotonic()
    least, most = (workers, workers) if isinstance(workers, int) else workers
    make: Any = PartMaker  # Ray Data takes classes for the functions that their instances are
    ray.data.DataContext.get_current().enable_progress_bars = False
    with Progress(f"making images of {source}", None, unit="row", enabled=progress) as bar:
        coming = _to_do(open_store(out), parts(read_rows(rows, arguments, names=names), part_size), counts)
        before = counts.images
        while some := list(itertools.islice(coming, PARTS_AT_ONCE)):
            given = ray.data.from_items([{"part": pickle.dumps(part)} for part in some], override_num_blocks=len(some))
            made = given.map(
                make,
                fn_constructor_args=(open_pipeline, place, options),
                compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most),
                **own,
            )
            for row in made.iter_rows():
                counts.add(row["rows"], row["images"], row["failed"])
                counts.reason = row["reason"] or counts.reason
                bar.update(counts.rows - bar.done)
                bar.note(f"{counts.failed} failed" if counts.failed else "")
                refuse_errors(counts, max_errors)
    seconds = time.monotonic() - started
    made_now = counts.images - before
    return Summary(counts.rows, counts.images, counts.failed, made_now, seconds, made_now / seconds, None)


def _begun(open_pipeline: Callable[[], Pipeline], out: str, options: Mapping[str, Any]) -> type:
    """Begins the job, or finds it begun. The class of its calls' arguments."""
    arguments: type = PartMaker(open_pipeline, out, options).pipe.task.arguments
    return arguments


def _to_do(store: Store, some: Iterator[Part], counts: Counts) -> Iterator[Part]:
    """The parts that are not whole; the others are counted."""
    for part in some:
        done = manifest.whole(store, part)
        if done is None:
            yield part
        else:
            counts.add(done.rows, done.images, done.failed)
