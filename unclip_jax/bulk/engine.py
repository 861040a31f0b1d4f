"""A bulk job: rows -> batches -> the devices -> files and their manifest, each ahead of the next.

A part of the rows is the unit of everything: what is in its batches, its files and its manifest follows from its own
rows alone, whoever makes it, and whether or not it was interrupted.
"""

import collections
import contextlib
import dataclasses
import datetime
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from unclip_jax.bulk import manifest, writing
from unclip_jax.bulk.batches import Batch, Begun, Part, ask, batches, parts
from unclip_jax.bulk.inputs import read_rows
from unclip_jax.bulk.job import Format, Job, begin, describe
from unclip_jax.bulk.making import Maker, Running
from unclip_jax.bulk.manifest import MADE, PartRecords, Record
from unclip_jax.bulk.store import Store, open_store
from unclip_jax.conditioning.address import shown
from unclip_jax.pipelines.pipeline import Pipeline
from unclip_jax.progress import Progress

# Batches whose files are being written at once: what they hold is bounded.
WRITING = 2
SEEN_BATCHES = 4  # of a dry run


@dataclasses.dataclass
class Counts:
    """What is done of a job, counted while it runs.

    Attributes:
        rows, images, failed: of the input's rows so far, those of earlier runs too.
        made: images that this run made.
        reason: of the last failure.
    """

    rows: int = 0
    images: int = 0
    failed: int = 0
    made: int = 0
    reason: str = ""

    def add(self, rows: int, images: int, failed: int) -> None:
        self.rows, self.images, self.failed = self.rows + rows, self.images + images, self.failed + failed

    def add_records(self, records: Sequence[Record]) -> None:
        reasons = [f"row {record['row']}: {record['reason']}" for record in records if record["status"] != MADE]
        self.add(len({record["row"] for record in records}), len(records) - len(reasons), len(reasons))
        self.reason = reasons[-1] if reasons else self.reason


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a job has come to.

    Attributes:
        rows, images, failed: of the input: rows that are done, images of them, and rows that could not be made.
        made: images that this run made, in so many seconds.
        images_per_second: after its first batch, which compiles.
        idle: the share of that time in which the devices had nothing to do. None: there was no second batch.
    """

    rows: int
    images: int
    failed: int
    made: int
    seconds: float
    images_per_second: float | None
    idle: float | None

    def lines(self) -> list[str]:
        """For people."""
        now = [f"{self.made} images made now", f"in {self.seconds:.1f} s", *_pace(self.images_per_second, self.idle)]
        return [f"{self.rows} rows: {self.images} images, {self.failed} rows failed", ", ".join(now)]


def make_parts(
    pipe: Pipeline,
    job: Job,
    store: Store,
    some: Iterable[Part],
    *,
    max_errors: int | None = None,
    threads: int | None = None,
    told: Callable[[Counts, str], None] = lambda counts, note: None,
) -> Summary:
    """Makes parts of a job, and goes on with those that were begun.

    Args:
        pipe: The pipeline.
        job: As `unclip_jax.bulk.job.describe` gives it.
        store: Where the files go.
        some: The parts, of rows as the job numbers them.
        max_errors: How many rows may fail; None: all.
        threads: That read inputs, and as many that write; None: by the cores.
        told: Called when something is written down, with a note of the rate.

    Raises:
        ValueError: The store holds a part of another input, or too many rows fail.
        OSError: The store refuses.
    """
    threads = _threads(threads)
    started, maker, counts = time.monotonic(), Maker(pipe, job.save, job.batch_size), Counts()
    working: dict[int, PartRecords] = {}

    def begun() -> Iterator[Begun]:
        for part in some:
            if (done := manifest.whole(store, part)) is not None:
                manifest.clear(store, part.number)
                counts.add(done.rows, done.images, done.failed)
                told(counts, "")
                continue
            working[part.number] = records = PartRecords(store, part)
            writing.remove_leftovers(store, part.number)
            counts.add_records(records.records)
            yield records.begun

    with maker.busy.watch, ThreadPoolExecutor(threads) as writers:
        running: collections.deque[tuple[Batch, Running | None]] = collections.deque()
        unrecorded: collections.deque[tuple[Batch, list[Record], list[Future[Record]]]] = collections.deque()

        def fetch() -> None:
            batch, run = running.popleft()
            made = [] if run is None else maker.fetch(run)
            failed = [writing.failed(one.row, str(one.reason)) for one in batch.refused]
            failed += [writing.failed(one.asked.row, one.reason) for one in made if one.reason is not None]
            files = [
                writers.submit(writing.write, store, job, pipe.config.scheduler, batch.part, one, number)
                for one in made
                for number in range(len(one.values))
            ]
            unrecorded.append((batch, failed, files))
            if len(unrecorded) > WRITING:
                record()

        def record() -> None:
            batch, failed, files = unrecorded.popleft()
            records = working[batch.part.number]
            new = [*failed, *(file.result() for file in files)]
            if new:
                records.add(batch.number, new)
                counts.add_records(new)
                counts.made += len(files)
            if batch.last:
                if job.shards:
                    writing.write_shard(store, records)
                records.complete()
                del working[batch.part.number]
            told(counts, ", ".join(_pace(maker.busy.rate, maker.busy.idle)))
            refuse_errors(counts, max_errors)

        coming = batches(begun(), lambda row: ask(pipe, job.settings, row), job.batch_size, threads)
        with contextlib.closing(coming):
            for batch in coming:
                running.append((batch, maker.begin(batch.asked) if batch.asked else None))
                if len(running) > 1:
                    fetch()
            while running:
                fetch()
            while unrecorded:
                record()
    seconds = time.monotonic() - started
    busy = maker.busy
    return Summary(counts.rows, counts.images, counts.failed, counts.made, seconds, busy.rate, busy.idle)


def refuse_errors(counts: Counts, max_errors: int | None) -> None:
    """Raises ValueError where more rows have failed than may."""
    if max_errors is not None and counts.failed > max_errors:
        raise ValueError(f"{counts.failed} rows failed, and max_errors is {max_errors}; the last: {counts.reason}")


def run(
    pipe: Pipeline,
    rows: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    save: Format = "png",
    shards: bool = False,
    batch_size: int = 8,
    part_size: int = 1024,
    names: Mapping[str, str] | None = None,
    max_errors: int | None = None,
    threads: int | None = None,
    host: int = 0,
    hosts: int = 1,
    **settings: Any,
) -> Summary:
    """Makes pictures of every row of an input, into a folder. Interrupted, even killed, it goes on where it was.

    What a row does not say, `settings` say, which are arguments of the pipeline's call. Rows that can share a batch do,
    whatever their order. The files are `files/PART/ROW-IMAGE.png`; `manifest/` has a record of every image, and of
    every row that failed, with the reason: JSON lines and parquet.

    A picture's noise comes from its row's `seed`, or from the job's seed and the row's number, and not from what is
    made beside it. A job that was interrupted makes the files that it would have made, byte for byte, on devices of the
    same kind and number.

    Args:
        pipe: The pipeline. Its adapters, watermark and safety checker serve the job.
        rows: A folder of pictures, a table, tars, or "-"; see `unclip_jax.bulk.inputs.read_rows`.
        out: A folder, here or at an address of fsspec. Of another job it is refused.
        save: "png", "jpeg" or "webp"; "latents", (h, w, 4), or "image_embeds", (D,), float32 as `.npy`.
        shards: One tar for the files of each part, `shards/PART.tar`, as webdataset reads it.
        batch_size: Images at once, over all devices.
        part_size: Rows that have one manifest and one tar.
        names: Columns of the input that are called otherwise: `{"text_en": "prompt"}`.
        max_errors: How many rows may fail before the job stops; None: all.
        threads: That read rows, and as many that write files; None: by the cores.
        host, hosts: This process makes the parts `host`, `host + hosts`, ...; others, with the same `out`, the others.
        **settings: Of every call: `num_inference_steps`, `guidance_scale`, `prompt`, `seed`, ...

    Returns:
        What was made.

    Raises:
        ValueError: For arguments, inputs and folders that are refused, and where more rows than `max_errors` fail.
        FileNotFoundError: There is no such input.
        OSError: The input, or the folder, cannot be read or written.
    """
    if not 0 <= host < hosts:
        raise ValueError(f"host is {host}; want 0 to {hosts - 1}")
    store, names = open_store(out), dict(names or {})
    source = shown(os.fspath(rows))
    job = describe(
        pipe,
        settings,
        save=save,
        shards=shards,
        batch_size=batch_size,
        part_size=part_size,
        names=names,
        source=source,
    )
    begin(store, job)
    mine = itertools.islice(parts(read_rows(rows, pipe.task.arguments, names=names), part_size), host, None, hosts)
    with Progress(f"making images of {source}", None, unit="row", enabled=pipe.progress) as bar:

        def count() -> None:
            with contextlib.suppress(Exception):  # who reads the rows hears of it
                bar.expect(sum(1 for _ in read_rows(rows, pipe.task.arguments, names=names)) // hosts)

        if pipe.progress and os.path.exists(rows):  # elsewhere it would be read twice over the network
            threading.Thread(target=count, daemon=True).start()

        def told(counts: Counts, note: str) -> None:
            bar.update(counts.rows - bar.done)
            bar.note(", ".join(part for part in (note, counts.failed and f"{counts.failed} failed") if part))

        return make_parts(pipe, job, store, mine, max_errors=max_errors, threads=threads, told=told)


def dry_run(
    pipe: Pipeline,
    rows: str | os.PathLike[str],
    *,
    save: Format = "png",
    batch_size: int = 8,
    names: Mapping[str, str] | None = None,
    threads: int | None = None,
    **settings: Any,
) -> list[str]:
    """What a job would make, and how long it would take, in lines for people. Nothing is written.

    All rows are counted. The first few are read and put into batches, of which one is made, twice.

    Args:
        pipe, rows, save, batch_size, names, threads, **settings: As for `run`.

    Returns:
        The lines.

    Raises:
        ValueError, FileNotFoundError, OSError: As for `run`.
    """
    source = shown(os.fspath(rows))
    job = describe(
        pipe, settings, save=save, shards=False, batch_size=batch_size, part_size=1, names=names or {}, source=source
    )
    coming = read_rows(rows, pipe.task.arguments, names=names)
    first = Part(0, list(itertools.islice(coming, SEEN_BATCHES * batch_size)))
    count = len(first.rows) + sum(1 for _ in coming)
    found = [*batches([Begun(first)], lambda row: ask(pipe, settings, row), batch_size, _threads(threads))]
    refused = [f"row {one.row.number}: {one.reason}" for batch in found for one in batch.refused]
    made = [batch.asked for batch in found if batch.asked]
    lines = [f"{count} rows in {source}; {len(refused)} of the first {len(first.rows)} cannot be made", *refused[:3]]
    if not made:
        return lines
    maker, seconds = Maker(pipe, job.save, batch_size), []
    with maker.busy.watch:
        for _ in range(2):
            started = time.monotonic()
            images = sum(len(one.values) for one in maker.fetch(maker.begin(made[0])))
            seconds.append(time.monotonic() - started)
    able = count * (1 - len(refused) / len(first.rows))
    per_row, of_each = len(first.rows) - len(refused), images / len(made[0])
    total = seconds[0] + seconds[1] * able * len(made) / per_row
    return [
        *lines,
        f"about {able * of_each:.0f} images, {of_each:.0f} of a row; {per_row / len(made):.1f} rows in a batch of "
        f"{batch_size}",
        f"a batch takes {seconds[1]:.2f} s, the first one {seconds[0]:.1f} s with its compilation: "
        f"about {datetime.timedelta(seconds=round(total))} for all",
    ]


def _threads(threads: int | None) -> int:
    return min(32, (os.cpu_count() or 1) + 2) if threads is None else threads


def _pace(rate: float | None, idle: float | None) -> list[str]:
    """What is known of them, for people."""
    told = [] if rate is None else [f"{rate:.2f} images a second"]
    return told if idle is None else [*told, f"devices idle {idle:.1%} of the time"]
