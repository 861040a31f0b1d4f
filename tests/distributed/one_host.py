"""One host of several: a process with two virtual devices, started by test_hosts.py.

python -m tests.distributed.one_host FOLDER host:port PROCESSES ID
"""

import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax
import numpy as np
from jax.sharding import Mesh

import unclip_jax
from tests.compiled_programs import compile_fast
from tests.training.small_run import small_run
from unclip_jax.distributed.hosts import join
from unclip_jax.distributed.mesh import gathered, local_mesh, make_chunk
from unclip_jax.sampling.noise import Branch

PROMPTS = ["a cat", "a dog", "a house", "a tree", "a boat"]
HEARTBEAT = 5


def make(folder, mesh):
    """Noise, latents and images of a call whose five images no number of devices divides."""
    pipe = unclip_jax.TextToImagePipeline.from_pretrained(folder / "model", "float32", mesh)
    pipe.progress = False
    chunk = make_chunk(pipe.mesh, np.arange(5), 1, np.full(5, 7, np.uint32), np.arange(5, dtype=np.int32))
    noise = pipe.programs.draw(chunk.seeds, chunk.indices, branch=Branch.LATENTS, shape=(8, 8, 4), number=0)
    out = pipe(PROMPTS, num_inference_steps=3, seed=7, scheduler="ddim", eta=1.0, output_type="np")
    return {
        "noise": gathered(noise)[:5],
        "rows": out.rows,
        "latents": out.latents,
        "images": out.images,
    }


def go_on(mesh, step_done):
    """Steps without an end, each of which needs all hosts."""
    total = jax.jit(lambda x: x.sum())
    while True:
        chunk = make_chunk(mesh, np.arange(8), 1, np.zeros(8, np.uint32), np.arange(8, dtype=np.int32))
        assert total(chunk.split(np.ones(8, np.int32))) == 8
        step_done()
        time.sleep(0.1)


if __name__ == "__main__":
    compile_fast(True)
    folder, coordinator, processes, process = sys.argv[1:]
    folder = Path(folder)
    join(coordinator, int(processes), int(process), heartbeat=HEARTBEAT)
    join()  # has happened
    devices = np.array(jax.devices())
    assert len(devices) == 2 * int(processes) == int(processes) * jax.local_device_count()
    made = make(folder, Mesh(devices, ("data",)))
    np.savez(folder / f"data-{process}.npz", **made)
    # Every weight is split between hosts.
    made = make(folder, Mesh(devices.reshape(-1, 2).T, ("data", "model")))
    np.savez(folder / f"model-{process}.npz", **made)
    state = small_run(folder / "run", mesh=local_mesh(devices), steps=12)
    np.savez(folder / f"train-{process}.npz", **gathered(state.average.params))
    go_on(local_mesh(devices), (folder / f"going-on-{process}").touch)
