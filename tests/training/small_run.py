"""A run of training of milliseconds a step, for tests that interrupt it; also a program.

small_run.py slow FOLDER: with time to be killed in. small_run.py full FOLDER: on a disk that is full after step 12.
"""

import resource
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from unclip_jax.distributed.mesh import local_mesh
from unclip_jax.training.data import batches
from unclip_jax.training.optimizer import adamw, learning_rate
from unclip_jax.training.rng import draw_step, step_keys
from unclip_jax.training.run import RunOptions, train
from unclip_jax.training.step import start_training

STEPS = 24
SHAPE = (4, 4, 8)
ROWS = np.random.default_rng(5).standard_normal((40, *SHAPE)).astype(np.float32)


def losses(params, batch, step):
    """A denoiser of one matrix."""
    draws = draw_step(step_keys(7, step, jnp.arange(len(batch["x"]))), SHAPE)
    guess = (batch["x"] + draws.noise) @ params["w"] + params["b"]
    each = jnp.square(guess - draws.noise).mean((1, 2, 3))
    return each, {"timestep": draws.timesteps.mean()}


def load(index, rng):
    return {"x": ROWS[index] + rng.standard_normal(SHAPE, np.float32) / 10}


def start(optimizer):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.standard_normal((8, 8)) / 4, jnp.float32), "b": jnp.zeros(8)}
    return start_training(params, optimizer)


def small_run(
    folder, devices=1, *, mesh=None, steps=STEPS, load=load, losses=losses, reports=(), validate=None, **options
):
    """Over some local devices, or over a mesh of all hosts."""
    optimizer = adamw(learning_rate(0.02, 4), max_grad_norm=1.0, accumulate=2)
    hosts = jax.process_count()
    options = {"save_every": 5, "report_every": 2, "ema_decay": 0.9, **options}
    return train(
        losses,
        optimizer,
        start(optimizer),
        batches(range(len(ROWS)), load, batch_size=8 // hosts, seed=3, host=jax.process_index(), hosts=hosts),
        Path(folder),
        RunOptions(steps, **options),
        mesh=local_mesh(jax.local_devices()[:devices]) if mesh is None else mesh,
        validate=validate,
        samples=lambda state: Image.new("RGB", (8, 8), (int(state.step), 0, 0)),
        reports=reports,
        progress=False,
    )


def slow_load(index, rng):
    time.sleep(0.002)
    return load(index, rng)


def fill_the_disk(step, metrics):
    """Once the checkpoint of step 10 is complete. A limit on the size of files stands in for the disk."""
    if step == 12:
        while not Path(folder, "checkpoints/10").exists():
            time.sleep(0.005)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40, 40))


if __name__ == "__main__":
    how, folder = sys.argv[1:]
    if how == "slow":
        small_run(folder, load=slow_load, save_every=3)
    else:
        small_run(folder, reports=[fill_the_disk], report_every=12)
