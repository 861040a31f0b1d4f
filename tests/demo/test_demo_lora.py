"""An adapter of the demo model, trained on ten images of a thing that the model has never seen drawn.

Before, the thing's name says nothing to it; after, the name alone - the image's embedding being all noise - gives
what is like the ten images.
"""

import json
import time

import numpy as np
import pytest
from PIL import Image

from convert.export.lora import FILE
from unclip_jax import UnCLIPPipeline
from unclip_jax.checkpoints.networks import Network
from unclip_jax.demo import demo_model
from unclip_jax.evaluation.similarity import cosines
from unclip_jax.training.lora import merge_lora
from unclip_jax.training.settings import read_settings
from unclip_jax.training.tasks import run_training

pytestmark = pytest.mark.heavy

NAME = "pretzel"


def ten_images(folder):
    """One held-out drawing, on ten backgrounds and places."""
    whole = Image.open(demo_model().parent / "pictures" / f"{NAME}.png").convert("RGB")
    rng = np.random.default_rng(0)
    with (folder / "metadata.jsonl").open("w") as file:
        for number in range(10):
            side = int(rng.integers(50, 65))
            picture = Image.new("RGB", (64, 64), "white")
            picture.paste(whole.resize((side, side)), tuple(int(x) for x in rng.integers(0, 65 - side, 2)))
            picture.save(folder / f"{number}.png")
            file.write(json.dumps({"file_name": f"{number}.png", "text": NAME}) + "\n")
    return folder


def test_an_adapter_learns_a_thing_in_three_minutes(tmp_path):
    (tmp_path / "pictures").mkdir()
    settings = {
        "task": "lora",
        "model": str(demo_model()),
        "out": str(tmp_path / "run"),
        "data": {"image_folder": str(ten_images(tmp_path / "pictures")), "flip": True},
        "batch_size": 8,
        "devices": 1,
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 20},
        "objective": {"embedding_dropout": 0.3, "min_snr_gamma": 5.0},
        "lora": {"rank": 8},
        "run": {"total_steps": 300, "report_every": 50, "ema_decay": 0.99},
    }
    (tmp_path / "settings.yaml").write_text(json.dumps(settings))
    started = time.monotonic()
    path = run_training(read_settings(tmp_path / "settings.yaml"), progress=False)
    seconds = time.monotonic() - started
    assert path.name == FILE

    pipe = UnCLIPPipeline.from_pretrained()
    pipe.progress = False
    source = np.full((64, 64, 3), 255, np.uint8)
    options = {"prompt": NAME, "noise_level": 1000, "guidance_scale": 3.0, "num_images_per_prompt": 12}
    pictures = [np.asarray(Image.open(p)) for p in sorted((tmp_path / "pictures").glob("*.png"))]
    wanted = pipe.encode_image_embeds(pictures).mean(0)[None].repeat(12, 0)
    before = cosines(
        pipe.encode_image_embeds([np.asarray(i) for i in pipe(image=source, **options).images]), wanted
    ).mean()
    unet = pipe.networks["unet"]
    adapter = adapter_of(path, pipe)
    pipe.networks["unet"] = Network(unet.graphdef, merge_lora(unet.params, adapter))
    after = cosines(
        pipe.encode_image_embeds([np.asarray(i) for i in pipe(image=source, **options).images]), wanted
    ).mean()
    print(f"{seconds:.0f} s; similarity {before:.2f} before, {after:.2f} after")
    assert after > before + 0.2
    assert seconds < 180


def adapter_of(path, pipe):
    """The file's adapter under our names again."""
    from safetensors.numpy import load_file

    from convert.engine import LAYOUTS
    from convert.rules import diffusers
    from unclip_jax.checkpoints.networks import abstract_params

    tensors = load_file(path)
    rules = diffusers.table(pipe.config, abstract_params(pipe.config)).rules
    found = {}
    for rule in rules:
        module = rule.foreign.replace("/", ".").removesuffix(".weight")
        for theirs, ours in (("lora_A", "down"), ("lora_B", "up")):
            if (name := f"{module}.{theirs}.weight") in tensors:
                found[f"{rule.ours.removeprefix('unet.')}.{ours}"] = LAYOUTS[rule.layout].ours(tensors[name])
    assert len(found) == len(tensors)
    return found
