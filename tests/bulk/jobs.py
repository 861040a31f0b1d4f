"""A small job, in one process and on a cluster: its rows and settings, and what opens the pipeline in an actor."""

import json
import os
import threading
import time

from PIL import Image

from tests.compiled_programs import compile_fast
from tests.pipelines.small_family import arguments, open_pipeline, photo

KEPT = ("noise_level", "num_inference_steps", "scheduler", "eta", "guidance_scale", "prompt", "height", "width")
SETTINGS = {name: arguments("variations")[name] for name in KEPT}
SIZES = {"batch_size": 4, "part_size": 6}


def write_rows(folder, tens=1):
    """Tens of rows: seeds of their own and not, settings of two kinds, one picture in ten that is none, two mixes."""
    for i in range(3):
        Image.fromarray(photo(i)).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    lines = [{"image": f"{i % 3}.png"} for i in range(10)]
    for i in (1, 4, 7):
        lines[i] |= {"num_inference_steps": 2, "prompt": f"number {i}"}
    for i in (0, 4):
        lines[i]["seed"] = 40 + i
    lines[3]["image"] = "broken.png"
    for i in (2, 8):
        lines[i] |= {"image": ["0.png", f"{i // 4}.png"], "image_weights": [1, i], "mix_noise_level": i}
    lines = [line | {"id": f"row {i}"} for i, line in enumerate(lines * tens)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "rows.jsonl"


def open_in_actor(folder, makers, seconds):
    """The small unCLIP in a process of Ray.

    Args:
        folder: Of the model.
        makers: A folder in which there is a file of each process that makes something: NODE-PROCESS.
        seconds: What each row takes more, so that there is time to kill it.
    """
    import ray

    compile_fast(True)  # as the process that it is compared with
    pipe = open_pipeline(folder, "UnCLIPPipeline", progress=False)
    check, lock, node = pipe.check, threading.Lock(), ray.get_runtime_context().get_node_id()

    def slow_check(**values):
        (makers / f"{node}-{os.getpid()}").touch()
        with lock:
            time.sleep(seconds)
        return check(**values)

    pipe.check = slow_check
    return pipe
