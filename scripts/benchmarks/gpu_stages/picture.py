"""Whole pictures through the pipeline, from embeddings to pixels: the first call, and those after it."""

import functools
import time

from gpu_stages.random_pipeline import arguments, random_pipeline
from gpu_stages.run import Add, Row, Run, add_each, times
from unclip_jax import UnCLIPPipeline

SIZES = ((64, 1), (64, 8), (96, 8))
# Images a second on an H200, computed beforehand.
PREDICTED = {(64, 1): 5.8, (64, 8): 10.9, (96, 8): 4.2}


def measure(run: Run, add: Add) -> None:
    pipe = random_pipeline(run)
    cases = [
        (
            {"latents": latents, "batch": batch, "steps": run.steps},
            functools.partial(pictures, pipe, run, latents, batch),
            0.0,
        )
        for latents, batch in SIZES
    ]
    add_each(run, add, cases)


def pictures(pipe: UnCLIPPipeline, run: Run, latents: int, batch: int) -> Row:
    """first_s: with programs from the folder of compiled ones, where an earlier stage has left them."""
    given = arguments(run, run.scaled(latents), batch)

    def make(progress: bool) -> None:
        pipe.progress = progress
        pipe(**given)

    started = time.time()
    made = pipe(**given)
    first = time.time() - started
    ways = {
        "picture": lambda: make(False),
        "with a bar": lambda: make(True),
        "decoding": lambda: pipe.to_pil(pipe.decode_latents(made.latents)),
    }
    timed = times(ways, min(run.rounds, 3))
    pipe.progress = False
    return {
        "first_s": first,
        "s": timed["picture"]["ms"] / 1e3,
        "with_bar_s": timed["with a bar"]["ms"] / 1e3,
        "decoding_ms_an_image": timed["decoding"]["ms"] / batch,
        "images_per_s": batch / timed["picture"]["ms"] * 1e3,
        "predicted": PREDICTED[latents, batch] if run.full_size else None,
    }
