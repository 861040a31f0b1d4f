"""Bulk jobs on a Ray cluster: the parts of a job are rows of Ray Data, and each of its actors holds a pipeline.

Ray Data streams the parts, holds them back where actors are busy, starts actors anew that died, and grows and shrinks
their number. A part's files do not depend on who makes them, so a job may begin on one machine and go on here.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import pickle
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from unclip_jax.bulk import manifest
from unclip_jax.bulk.batches import Part, parts
from unclip_jax.bulk.engine import Counts, Summary, make_parts, refuse_errors
from unclip_jax.bulk.inputs import read_rows
from unclip_jax.bulk.job import Format, Job, begin, describe
from unclip_jax.bulk.store import Store, open_store
from unclip_jax.conditioning.address import shown
from unclip_jax.pipelines.pipeline import Pipeline
from unclip_jax.progress import Progress

# What is given to Ray Data at once, and held by it. Rows of a table may have their pictures in them.
PARTS_AT_ONCE = 1000
BYTES_AT_ONCE = 1 << 30
ERRORS = (ValueError, OSError, ImportError)  # of inputs, checkpoints and stores: raised here as they are


class PartMaker:
    """An actor. It holds a pipeline, its job, and the store that it writes to."""

    def __init__(self, open_pipeline: Callable[[], Pipeline], out: str, options: Mapping[str, Any]):
        self.open_pipeline, self.out, self.options = open_pipeline, out, options

    @functools.cached_property
    def opened(self) -> tuple[Pipeline, Job, Store]:
        """Begins the job, or finds it begun."""
        pipe = self.open_pipeline()
        pipe.progress = False
        store, job = open_store(self.out), describe(pipe, **self.options)
        begin(store, job)
        return pipe, job, store

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Makes a part. Returns what `Counts` has, and the error that it ended with: Ray Data would lose its kind."""
        counts, failure = Counts(), b""

        def told(now: Counts, note: str) -> None:
            nonlocal counts
            counts = now

        try:
            make_parts(*self.opened, [pickle.loads(row["part"])], told=told)
        except ERRORS as error:
            failure = pickle.dumps(error)
        return {**dataclasses.asdict(counts), "error": failure}


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
        address: Of the cluster, HOST:PORT or "auto". None: `RAY_ADDRESS`, or a cluster on this machine. Where the
            process is connected already, that cluster.
        workers: How many actors, or the least and the most.
        resources: Of an actor: {"num_gpus": 1}, {"num_cpus": 8}, {"resources": {"TPU": 4}}. None: one core.
        save, shards, batch_size, part_size, names, max_errors, **settings: As for `run`.
        progress: Show how far it is.

    Returns:
        What was made. The rate is that of all actors, with their starts; idle time is not known. Of a part whose actor
        died, images that it had made are not counted as made now.

    Raises:
        ImportError: Ray is not installed.
        ValueError, FileNotFoundError, OSError: As for `run`; and OSError, where there is no cluster.
    """
    source, place, own = shown(os.fspath(rows)), open_store(out).address, dict(resources or {"num_cpus": 1})
    least, most = (workers, workers) if isinstance(workers, int) else workers
    if not 1 <= least <= most:
        raise ValueError(f"workers is {workers!r}; want a number from 1, or the least and the most")
    options: dict[str, Any] = {
        "save": save,
        "shards": shards,
        "batch_size": batch_size,
        "part_size": part_size,
        "source": source,
    }
    options |= {"names": dict(names or {}), "settings": settings}
    job = open_pipeline, place, options
    counts, started = Counts(), time.monotonic()
    with _connected(address) as ray:
        _warn_of_waiting(ray.nodes(), own)
        arguments = _begin(ray, job, own)
        with Progress(f"making images of {source}", None, unit="row", enabled=progress) as bar:
            coming = _to_do(open_store(out), parts(read_rows(rows, arguments, names=names), part_size), counts)
            for some in _some_at_once(coming):
                for row in _made(some, job, least, most, own):
                    if row["error"]:
                        raise pickle.loads(row["error"])
                    counts.add(row["rows"], row["images"], row["failed"])
                    counts.made, counts.reason = counts.made + row["made"], row["reason"] or counts.reason
                    bar.update(counts.rows - bar.done)
                    bar.note(f"{counts.failed} failed" if counts.failed else "")
                    refuse_errors(counts, max_errors)
    seconds = time.monotonic() - started
    return Summary(counts.rows, counts.images, counts.failed, counts.made, seconds, counts.made / seconds, None)


def _made(
    some: list[dict[str, bytes]], job: tuple[Any, ...], least: int, most: int, own: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """What actors make of some parts, as it is done. job: of `PartMaker`."""
    import ray.data

    make: Any = PartMaker  # Ray Data takes classes for the functions that their instances are
    least, most = min(least, len(some)), min(most, len(some))
    # No part waits for one actor while another is free.
    pool = ray.data.ActorPoolStrategy(min_size=least, max_size=most, max_tasks_in_flight_per_actor=1)
    given = ray.data.from_items(some, override_num_blocks=len(some))
    yield from given.map(make, fn_constructor_args=job, compute=pool, **own).iter_rows()


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """Ray, quiet. A connection that was made here ends here, and with it the actors."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(f"a job on a cluster needs Ray: pip install 'unclip-jax[ray]' ({error})") from error
    mine = not ray.is_initialized()
    if mine:
        with warnings.catch_warnings():
            # JAX warns of a fork, after which Ray runs another program at once.
            warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its plans, and the traces of errors that are raised here
    context = ray.data.DataContext.get_current()
    bars, context.enable_progress_bars = context.enable_progress_bars, False
    try:
        yield ray
    finally:
        context.enable_progress_bars = bars
        if mine:
            ray.shutdown()


def _warn_of_waiting(nodes: Iterable[Mapping[str, Any]], own: Mapping[str, Any]) -> None:
    """A cluster may be about to grow; where it is not, a job would wait forever without a word."""
    want = {"CPU": own.get("num_cpus", 0), "GPU": own.get("num_gpus", 0), **own.get("resources", {})}
    for node in nodes:
        if node["Alive"] and all(node["Resources"].get(name, 0) >= amount for name, amount in want.items()):
            return
    wanted = " and ".join(f"{amount} {name}" for name, amount in want.items() if amount)
    warnings.warn(f"no machine of the cluster has {wanted} for a worker; the job waits for one", stacklevel=3)


def _some_at_once(coming: Iterable[Part]) -> Iterator[list[dict[str, bytes]]]:
    """Parts as rows of Ray Data, as many as are given to it at once."""
    some: list[dict[str, bytes]] = []
    size = 0
    for part in coming:
        some.append({"part": pickle.dumps(part)})
        size += len(some[-1]["part"])
        if len(some) == PARTS_AT_ONCE or size >= BYTES_AT_ONCE:
            yield some
            some, size = [], 0
    if some:
        yield some


def _begin(ray: Any, job: tuple[Any, ...], own: Mapping[str, Any]) -> type:
    """Begins the job in a process of the cluster, so that what is wrong with it is said once, and not by every actor.

    The process ends, and leaves its devices to an actor. Returns the class of the arguments of the pipeline's calls.
    """
    try:
        arguments: type = ray.get(ray.remote(max_calls=1, **own)(_arguments).remote(*job))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ERRORS):
            raise error.cause from None
        raise
    return arguments


def _arguments(*job: Any) -> type:
    arguments: type = PartMaker(*job).opened[0].task.arguments
    return arguments


def _to_do(store: Store, some: Iterator[Part], counts: Counts) -> Iterator[Part]:
    """The parts that are not whole; the others are counted."""
    for part in some:
        done = manifest.whole(store, part)
        if done is None:
            yield part
        else:
            counts.add(done.rows, done.images, done.failed)
