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
# # Convert a checkpoint
#
# Stable Diffusion checkpoints come as one file of the original code ([Rombach et al.
# 2021](https://arxiv.org/abs/2112.10752), Stability-AI/stablediffusion) or as a diffusers folder. You will see how
# both are proved complete, read without PyTorch, compared array by array, and written back bit for bit. If PyTorch is
# installed, one drawing is made by diffusers and by this library.

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
CHECKPOINT = None  # small ones, made below; or an unCLIP: a file such as "sd21-unclip-h.ckpt", or a hub id

# %% [markdown]
# `None` needs no download. The original file is then a small text-to-image model with **random weights**, written in
# the original's format: its images are texture. The diffusers folder is the [demo model](../docs/demo-model.md), with
# 6.3 million weights trained on drawings.
#
# With the real file the rest stays the same:
#
# - The file has 5 to 8 GB, and three times as much is written here: in Colab, have 32 GB of disk free, including the
#   file. Converting needs memory for one tensor at a time.
# - Making images of 768x768 needs an accelerator, and 5 GB of its memory in bfloat16, the default there. *Out of
#   memory* (`RESOURCE_EXHAUSTED`): see [docs/memory.md](../docs/memory.md).
# - If you have no file: a hub id, such as `sd2-community/stable-diffusion-2-1-unclip`, is a diffusers folder, and
#   every command below accepts it. A repository behind a form needs `HF_TOKEN`; this one does not.

# %%
import jax

print(f"{jax.device_count()} {jax.default_backend()} device(s):", jax.devices())
if jax.default_backend() == "cpu" and CHECKPOINT is not None:
    print("No accelerator, which is slow with a real checkpoint. In Colab: Runtime > Change runtime type.")

# %%
from pathlib import Path

import numpy as np
from IPython.display import display
from PIL import Image
from safetensors.numpy import load_file

import unclip_jax
from convert import write_random_checkpoint
from convert.__main__ import main as convert  # what `python -m convert` runs
from unclip_jax import open_checkpoint
from unclip_jax.demo import demo_images, demo_model
from unclip_jax.image_files import contact_sheet

demo = CHECKPOINT is None
settings = {"num_inference_steps": 20, "guidance_scale": 3.0 if demo else 10.0}
if demo:
    original, config = write_random_checkpoint("original/tiny.safetensors", "tiny-text-to-image")
    of_config = {"config": config}  # published architectures are recognised; this one has a yaml
else:
    original, of_config = Path(CHECKPOINT), {}
options = [word for name, value in of_config.items() for word in (f"--{name}", str(value))]

# %% [markdown]
# ## What a file holds
#
# Names, layouts and shapes differ: PyTorch stores convolutions as OIHW and linear layers as (out, in), JAX as HWIO
# and (in, out). One table ties each foreign tensor to one parameter, and is read in both directions.
# [docs/formats.md](../docs/formats.md) has all of it; here are a few rows.

# %%
from convert.rules import ldm

with open_checkpoint(original, **of_config) as checkpoint:
    shapes = {name: parameter.shape for name, parameter in checkpoint.params.items()}
    rules = ldm.table(checkpoint.config, checkpoint.params).rules
for rule in rules:
    if rule.ours.endswith(("unet.conv_in.kernel", "down_blocks.1.attentions.0.proj_in.kernel", "conv_norm_out.scale")):
        print(f"{rule.foreign}\n    {rule.layout:8} {rule.ours} {shapes[rule.ours]}")

# %%
numbers = {}
for name, shape in shapes.items():
    network = name.split(".")[0]
    count, total = numbers.get(network, (0, 0))
    numbers[network] = (count + 1, total + int(np.prod(shape)))
for network, (count, total) in numbers.items():
    print(f"{network:16} {count:5} parameters {total / 1e6:10.2f} million numbers")

# %% [markdown]
# ## The proof, before anything is read
#
# `--check` reads names, shapes and dtypes but no weights, and takes seconds for any size. Every tensor must be used
# once, or be known as one that no network reads; every parameter must be filled once. Missing, misshapen and unknown
# tensors are named.

# %%
status = convert([str(original), "--check", *options])

# %% [markdown]
# The same for a file from which one tensor was removed:

# %%
import safetensors.numpy

if demo:
    tensors = load_file(original)
    del tensors["first_stage_model.decoder.conv_out.bias"]
    safetensors.numpy.save_file(tensors, "broken.safetensors")
    try:
        open_checkpoint("broken.safetensors", **of_config)
    except ValueError as error:
        print(error)

# %% [markdown]
# ## Three layouts of one model
#
# The original file is written as our own directory, which opens at once; as a diffusers folder, for PyTorch users;
# and, from that folder, as an original file again.

# %%
import shutil

for name in ("ours", "folder"):  # of an earlier run: what is there is never overwritten
    shutil.rmtree(name, ignore_errors=True)
for name in ("back.safetensors", "back.safetensors.yaml"):
    Path(name).unlink(missing_ok=True)
assert convert([str(original), "ours", *options]) == 0
assert convert([str(original), "folder", "--to", "diffusers", *options]) == 0
assert convert(["folder", "back.safetensors", "--to", "original"]) == 0

# %% [markdown]
# All open as the same arrays, bit for bit:


# %%
def arrays(source, **options):
    with open_checkpoint(source, **options) as checkpoint:
        return {name: np.array(parameter.read()) for name, parameter in checkpoint.params.items()}


def same(first, second):
    return first.keys() == second.keys() and all(np.array_equal(a, second[name]) for name, a in first.items())


first = arrays(original, **of_config)
print("our directory:   ", same(first, arrays("ours")))
print("diffusers folder:", same(first, arrays("folder")))

# %% [markdown]
# Back again: the file written from the diffusers folder holds exactly the tensors of the first one, under the same
# names. (For a pickled `.ckpt` the tensors that are read are compared: the file written is always `.safetensors`.)

# %%
if original.suffix == ".safetensors":
    print("back again:", same(load_file(original), load_file("back.safetensors")))

# %% [markdown]
# ## Parity
#
# Equal arrays are half of it; the other half is equal computation. The original's code and diffusers differ in
# details (the tokenizer's padding, epsilons, how images are resized), which the checkpoint records as its reference.
# With one solver and one seed the two layouts of this model give:


# %%
def image(source, **options):
    pipe = unclip_jax.from_pretrained(source, "float32", **options)
    call = {"image": demo_images() / "giraffe.png"} if isinstance(pipe, unclip_jax.UnCLIPPipeline) else {}
    call |= {"prompt": "a red boat", "scheduler": "ddim", "output_type": "np"}
    return pipe(**call, **{**settings, "num_inference_steps": 10}).images[0]


by_original, by_folder = image(original, **of_config), image("folder")
print(f"largest difference of two pixels, of 0..1: {np.abs(by_original - by_folder).max():.1e}")
assert by_original.std() > 0.02, "the image is blank"

# %%
sheet = [(by_original, "original file"), (by_folder, "diffusers folder")]
display(contact_sheet([], sheet, cell=96).quantize())

# %% [markdown]
# (The images are texture if the weights are random.) The tests compare with PyTorch itself;
# [docs/parity.md](../docs/parity.md) lists the differences by pipeline and solver, about 1e-5. Here is one such
# comparison, live: the demo model exported for diffusers, or the real one, with the same noise in both programs. It
# needs `pip install torch diffusers transformers`; without them only our half is made.

# %%
from convert import save_diffusers

if demo:
    shutil.rmtree("drawings", ignore_errors=True)
    with open_checkpoint(demo_model()) as checkpoint:
        save_diffusers(checkpoint, "drawings")
drawings = "drawings" if demo else "folder"
pipe = unclip_jax.UnCLIPPipeline.from_pretrained(drawings, "float32")
drawing = Image.open(demo_images() / "red-apple.png").convert("RGB")
size = pipe.config.unet.sample_size
noise = np.random.default_rng(0).standard_normal((1, size, size, 4), np.float32)  # B, H, W, C
image_noise = np.random.default_rng(1).standard_normal((1, pipe.config.image_embedding_dim), np.float32)
ours = pipe(drawing, scheduler="ddim", latents=noise, image_noise=image_noise, output_type="np", **settings).images[0]

# %%
installed = all(importlib.util.find_spec(name) for name in ("torch", "diffusers", "transformers"))
shown = [(ours, "unclip_jax")]
if installed:
    import diffusers
    import torch

    diffusers.utils.logging.set_verbosity_error()
    reference = diffusers.StableUnCLIPImg2ImgPipeline.from_pretrained(drawings, torch_dtype=torch.float32)
    reference.scheduler = diffusers.DDIMScheduler.from_config(reference.scheduler.config)
    reference.set_progress_bar_config(disable=True)
    reference.to("cuda" if torch.cuda.is_available() else "cpu")
    draw = torch.from_numpy(image_noise).to(reference.device)
    diffusers.pipelines.stable_diffusion.pipeline_stable_unclip_img2img.randn_tensor = lambda *shape, **how: draw
    latents = torch.from_numpy(noise.transpose(0, 3, 1, 2))
    theirs = reference(drawing, prompt="", latents=latents, output_type="np", **settings).images[0]
    print(f"largest difference of two pixels, of 0..1: {np.abs(ours - theirs).max():.1e}")
    shown.append((theirs, "diffusers, PyTorch"))
else:
    print("torch and diffusers are not installed here: nothing is compared live; see docs/parity.md")

# %%
display(contact_sheet([(drawing, "red apple")], shown, 2, 96).quantize())

# %% [markdown]
# LoRAs and textual inversion embeddings convert, too ([docs/adapters.md](../docs/adapters.md)), and so do CLIP models
# and priors. The command is `python -m convert SRC DST --to diffusers`; `--dtype bfloat16` halves the size of the
# result, and `--sha256` refuses a source that is not the one you meant.
