"""Batches on the devices: one is made while the next is prepared and the last is written."""

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from unclip_jax.bulk.batches import Asked
from unclip_jax.bulk.job import Format
from unclip_jax.distributed.mesh import batch_sharding, data_size
from unclip_jax.image_files import NAN_PIXELS
from unclip_jax.pipelines import finish
from unclip_jax.pipelines.joined import join
from unclip_jax.pipelines.parts import Parts, encode_prompts, uint8_program
from unclip_jax.pipelines.pipeline import Pipeline
from unclip_jax.pipelines.request import Request
from unclip_jax.pipelines.run import begin, chunk_of

# Batches of prompts whose states are kept: in many jobs all rows have the same negative prompt, or no prompt.
KEPT_PROMPTS = 8


class Running(NamedTuple):
    """A batch on its way.

    Attributes:
        asked: its rows. request: theirs, with rows repeated up to the size of every batch. of_each: images of a row.
        made: arrays on the devices that are there when it is done; see `Maker.fetch`.
        started: when, by the monotonic clock.
    """

    asked: Sequence[Asked]
    request: Request[Any]
    of_each: int
    made: Any
    started: float


class Made(NamedTuple):
    """What was made of a row: pictures or arrays, one for each of its images; or the reason why there are none."""

    asked: Asked
    values: list[Any]
    reason: str | None
    seconds: float


class Busy:
    """How long the devices had work: the time that at least one batch, or the encoders of one, was on its way.

    Attributes:
        first, last: when the first batch was done, with all that it compiled, and the last one.
        seconds, images: in which they had work, and of batches that were done, from `first` to `last`.
    """

    def __init__(self) -> None:
        self.first: float | None = None
        self.last = self.since = self.seconds = 0.0
        self.running = self.images = 0
        self.lock = threading.Lock()
        self.watch = ThreadPoolExecutor(1)

    def begins(self) -> None:
        with self.lock:
            if not self.running:
                self.since = time.monotonic()
            self.running += 1

    def ends(self, images: int = 0) -> None:
        """images: that are done with it."""
        with self.lock:
            now, self.running = time.monotonic(), self.running - 1
            if self.first is not None and not self.running:
                self.seconds += now - self.since
            if images and self.first is None:
                self.first = self.since = self.last = now
            elif images:
                self.last, self.images = now, self.images + images

    def ends_with(self, arrays: Any, images: int) -> None:
        """The work that the devices were given ends when these arrays are there."""

        def wait() -> None:
            with contextlib.suppress(Exception):  # who fetches the arrays hears of it
                jax.block_until_ready(arrays)
            self.ends(images)

        self.watch.submit(wait)

    @property
    def rate(self) -> float | None:
        """Images a second, after the first batch. None: there was no other."""
        return self.images / (self.last - self.first) if self.images and self.first is not None else None

    @property
    def idle(self) -> float | None:
        """The share of that time in which the devices had nothing to do."""
        return 1 - self.seconds / (self.last - self.first) if self.images and self.first is not None else None


class Maker:
    """Makes batches with a pipeline, always `images` at once."""

    def __init__(self, pipe: Pipeline, save: Format, images: int):
        self.pipe, self.save, self.images = pipe, save, images
        group = max(1, images // data_size(pipe.mesh))
        self.parts: Parts = dataclasses.replace(pipe.parts, progress=False, at_a_time=group)
        self.marks = finish.Marks(pipe.watermark, pipe.safety_checker)
        self.encode_prompts = functools.lru_cache(KEPT_PROMPTS)(functools.partial(encode_prompts, self.parts))
        self.busy = Busy()

    def begin(self, asked: Sequence[Asked]) -> Running:
        """Gives the devices a batch. Returns before it is done, but after its encoders are."""
        started = time.monotonic()
        each = [row.request for row in asked if row.request is not None]
        full = max(1, self.images // each[0].batch)
        request = join(each + each[-1:] * (full - len(each)))
        self.busy.begins()
        request = self._with_text(request)
        conditions = self.pipe.task.conditions(self.parts, request)
        self.busy.ends(len(each) if self.save == "image_embeds" else 0)
        if self.save == "image_embeds":
            return Running(asked, request, each[0].batch, conditions.image_embeds, started)
        chunk = chunk_of(self.parts, request, np.arange(request.batch))
        carry, run_steps = begin(self.parts, request, conditions, chunk)
        self.busy.begins()
        latents = run_steps(carry, 0, request.solver.calls)[0].latents
        made = latents if self.save == "latents" else self._decode(request, latents)
        self.busy.ends_with(made, sum(one.batch for one in each))
        return Running(asked, request, each[0].batch, made, started)

    def fetch(self, running: Running) -> list[Made]:
        """What was made of each row. Waits until the batch is done."""
        jax.block_until_ready(running.made)
        seconds = (time.monotonic() - running.started) / len(running.asked)
        rows, values, broken = running.request.batch // running.of_each, running.made, None
        if self.save == "image_embeds":
            values = np.reshape(values, (rows, -1, np.shape(values)[-1]))
            values = values[:, 0] if values.shape[1] == 1 else values  # of a mix there are several
        elif self.save == "latents":
            values = np.asarray(values)
        else:
            count = len(running.asked) * running.of_each
            images, broken = (_in_order(arrays)[:count] for arrays in zip(*values, strict=True))
            values = finish.finish_arrays(self.marks, running.request, images)[0]
        of_each = 1 if self.save == "image_embeds" else running.of_each
        made = []
        for i, row in enumerate(running.asked):
            some = slice(i * of_each, (i + 1) * of_each)
            reason = f"FloatingPointError: {NAN_PIXELS}" if broken is not None and broken[some].any() else None
            made.append(Made(row, [] if reason else list(values[some]), reason, seconds))
        return made

    def _with_text(self, request: Request[Any]) -> Request[Any]:
        """The request with the states of its prompts, which are kept for requests with the same ones."""
        changes: dict[str, Any] = {}
        for name, prompts, read in (
            ("prompt_embeds", request.prompts, True),
            ("negative_prompt_embeds", request.negative_prompts, request.guidance.unconditional),
        ):
            if read and getattr(request, name) is None:
                changes[name] = self.encode_prompts(tuple(prompts))
        return dataclasses.replace(request, **changes)

    def _decode(self, request: Request[Any], latents: jax.Array) -> list[Any]:
        """(uint8 images, which of them are broken), one image a device at a time, where they are."""
        devices, params = data_size(self.parts.mesh), self.parts.weights("vae")
        rounding = finish.rounding_of(self.parts.config.reference)
        program = uint8_program(self.parts, rounding, finish.tiles(self.parts, request))
        made = []
        for row in range(len(latents) // devices):
            one = jax.device_put(_row_of_each(latents, row, devices=devices), batch_sharding(self.parts.mesh))
            made.append(program(params, one))
        return made


@functools.partial(jax.jit, static_argnames="devices")
def _row_of_each(latents: jax.Array, row: int, *, devices: int) -> jax.Array:
    """(R, h, w, c) over the devices -> (devices, h, w, c): this one of each device's."""
    return latents.reshape(devices, -1, *latents.shape[1:])[:, row]


def _in_order(of_each: Sequence[jax.Array]) -> np.ndarray:
    """What `_row_of_each` took apart, (devices, ...) each, on the host and together: (R, ...)."""
    arrays = np.stack([np.asarray(array) for array in of_each], axis=1)
    return arrays.reshape(-1, *arrays.shape[2:])
