"""Rows into batches: read and checked on threads, ahead of the devices; rows that go together share a batch.

What is in a batch follows from the rows of its part alone, in their order: so a job that goes on makes the batches that
it would have made.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Collection, Generator, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np

from unclip_jax.bulk.rows import Row, resolve
from unclip_jax.dataset_files import reason
from unclip_jax.pipelines.joined import company
from unclip_jax.pipelines.pipeline import Pipeline
from unclip_jax.pipelines.request import Request

T = TypeVar("T")
R = TypeVar("R")

# So many batches' rows may wait for company. Then those that wait longest go without: pictures of a thousand sizes
# would otherwise all be held.
WAITING = 8
MAX_INDEX = int(np.iinfo(np.int32).max)


class Part(NamedTuple):
    """Rows that are recorded together. number: from 0, over the whole input."""

    number: int
    rows: list[Row]


class Asked(NamedTuple):
    """A row, and the request that it stands for; or the reason why it is refused.

    Attributes:
        company: what the requests of a batch share.
    """

    row: Row
    request: Request[Any] | None = None
    company: Hashable = None
    reason: str | None = None


class Batch(NamedTuple):
    """Rows that are made together.

    Attributes:
        part: of which part. number: which of its batches. last: whether it is the last one.
        asked: the rows, with requests; none in a last batch that has only refusals to report.
        refused: rows before it that cannot be made.
    """

    part: Part
    number: int
    last: bool
    asked: list[Asked]
    refused: list[Asked]


class Begun(NamedTuple):
    """A part of which something is recorded: the numbers of those rows, and how many batches made them."""

    part: Part
    rows: Collection[int] = ()
    batches: int = 0


def parts(rows: Iterable[Row], size: int) -> Iterator[Part]:
    """The rows in parts of this size; the last may be smaller."""
    rows = iter(rows)
    for number in itertools.count():
        if not (some := list(itertools.islice(rows, size))):
            return
        yield Part(number, some)


def ask(pipe: Pipeline, settings: Mapping[str, Any], row: Row) -> Asked:
    """Reads and checks a row; touches no device.

    The noise of its image number i comes from (the row's seed, i), as in a call with that seed. Without a seed of its
    own it comes from (the job's seed, row number * images per row + i), as in one call with all rows.
    """
    try:
        request = pipe.check(**{**settings, **resolve(row)})
        if "seed" not in row.values:
            first = row.number * request.batch
            if first + request.batch > MAX_INDEX:
                raise ValueError(f"the number of the row is too high for its noise: give it a seed, below {MAX_INDEX}")
            request = dataclasses.replace(request, indices=request.indices + np.int32(first))
    except (ValueError, OSError) as error:
        return Asked(row, reason=reason(error))
    return Asked(row, request, company(request))


def batches(
    begun: Iterable[Begun], asking: Callable[[Row], Asked], images: int, threads: int
) -> Generator[Batch, None, None]:
    """The batches of parts, part by part.

    Args:
        begun: The parts. What is recorded of them is left out.
        asking: As `ask`. It runs on threads, some rows ahead.
        images: In a batch. A row with more images is a batch of its own.
        threads: How many.

    Yields:
        The batches. Of every part the last one is marked.
    """

    def rows() -> Iterator[tuple[Begun, Row | None]]:
        for one in begun:
            yield from ((one, row) for row in one.part.rows if row.number not in one.rows)
            yield one, None

    def asked(item: tuple[Begun, Row | None]) -> tuple[Begun, Asked | None]:
        return item[0], None if item[1] is None else asking(item[1])

    waiting: dict[Hashable, list[Asked]] = {}
    refused: list[Asked] = []
    number = 0
    with ThreadPoolExecutor(threads) as pool:
        for one, row in _ahead(pool, asked, rows(), 2 * images + threads):
            if row is None:
                groups = [*waiting.values()] or [[]]
                for i, group in enumerate(groups, 1):
                    yield Batch(one.part, one.batches + number, i == len(groups), group, refused)
                    number, refused = number + 1, []
                waiting, number = {}, 0
                continue
            if row.request is None:
                refused.append(row)
                continue
            group = waiting.setdefault(row.company, [])
            group.append(row)
            key = row.company
            if len(group) < max(1, images // row.request.batch):
                if sum(map(len, waiting.values())) < WAITING * images:
                    continue
                key = next(iter(waiting))  # the one that waits longest
            yield Batch(one.part, one.batches + number, False, waiting.pop(key), refused)
            number, refused = number + 1, []


def _ahead(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], most: int) -> Iterator[R]:
    """The function's results in the order of the items, `most` of them in work or waiting to be taken."""
    running: collections.deque[Future[R]] = collections.deque()
    try:
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) == most:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for future in running:
            future.cancel()
