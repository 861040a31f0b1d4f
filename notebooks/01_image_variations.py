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
# # Image variations
#
# This notebook makes images that are variations of a given one. You will see variations of one drawing and of
# several, the effect of the seed, of a prompt and a negative prompt, and an image while it is being made.
#
# The model is Stable unCLIP, a latent diffusion model ([Rombach et al. 2021](https://arxiv.org/abs/2112.10752)) that
# paints what a CLIP image embedding describes, like the decoder of unCLIP ([Ramesh et al.
# 2022](https://arxiv.org/abs/2204.06125)).

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
# `None` is the [demo model](../docs/demo-model.md): it has all parts of the real one, with 6.3 million weights
# trained on drawings of emoji. It runs on a CPU, knows only drawings, and makes images of 64x64 pixels.
#
# The real checkpoint is a hub id, a diffusers folder, or an original `.ckpt` or `.safetensors` file. The rest of this
# notebook stays the same. What to expect:
#
# - Images of 768x768, also of photographs. The weights take 7.2 GiB in float32 (the default on a CPU) and half of
#   that in bfloat16 (on accelerators), so use a GPU or a TPU. The first call compiles for a minute or more.
# - *Out of memory* (`RESOURCE_EXHAUSTED`): use `batch_size=1` in a call, or
#   `memory=unclip_jax.Memory(free_networks=True, decoding="seamless")` in `from_pretrained`;
#   [docs/memory.md](../docs/memory.md) has more.
# - *A login is needed* (`PermissionError`): the repository is behind a form. Accept it there and set `HF_TOKEN`, in
#   Colab by the key at the left; the one named above needs none.

# %%
import jax

print(f"{jax.device_count()} {jax.default_backend()} device(s):", jax.devices())
if jax.default_backend() == "cpu" and CHECKPOINT is not None:
    print("No accelerator, which is slow with a real checkpoint. In Colab: Runtime > Change runtime type.")

# %% [markdown]
# The settings that differ between the two models are here. Stable Diffusion is used with a guidance scale of about
# 10, the small model with 3. `PHOTO` may be the path of any image. Since the demo model knows only drawings, it is
# one of those that ship with the package and were not seen in training.

# %%
from IPython.display import display

import unclip_jax
from unclip_jax.demo import demo_images
from unclip_jax.image_files import contact_sheet

PHOTO = demo_images() / "fire-engine.png"
demo = CHECKPOINT is None
settings = {"num_inference_steps": 20, "guidance_scale": 3.0 if demo else 10.0}
cell = 96 if demo else 192  # pixels of an image on the sheets below

pipe = unclip_jax.UnCLIPPipeline.from_pretrained(CHECKPOINT)


def show(inputs, variations, columns=4):
    """Draws a contact sheet. 128 colours make it a third as large, which keeps the notebook small."""
    display(contact_sheet(inputs, variations, columns, cell).quantize(128))


# %% [markdown]
# ## An image and its variations
#
# CLIP's image encoder turns the image into one vector, which describes what is in it, but hardly where. Each image
# then starts from its own noise and is denoised towards that vector in 20 steps. Variations therefore keep content,
# colours and style, and differ in everything that the embedding leaves open.
#
# The first call compiles; later ones of the same shape do not. `contact_sheet` shows images beside their source.

# %%
out = pipe(image=PHOTO, num_images_per_prompt=8, seed=0, **settings)
show([(PHOTO, PHOTO.stem)], [(image, f"image {i}") for i, image in enumerate(out.images)])

# %% [markdown]
# The images are plain PIL images. `out.latents` are their latents, `out.image_embeds` the embedding.

# %%
out.images[0].save("variation.png")
print(out.images[0].size, out.latents.shape, out.image_embeds.shape)

# %% [markdown]
# ## Several images
#
# A list makes variations of each image, those of one image side by side. Four images with two variations are eight
# images, as before, so nothing compiles.

# %%
paths = [demo_images() / f"{name}.png" for name in ("red-apple", "giraffe", "pink-heart", "lady-beetle")]
out = pipe(image=paths, num_images_per_prompt=2, seed=0, **settings)
show(
    [(path, path.stem) for path in paths],
    [(image, f"{paths[i // 2].stem} {i % 2}") for i, image in enumerate(out.images)],
    columns=2,
)

# %% [markdown]
# The lady beetle becomes a dark round thing: the model has seen no drawing nearer to it.
#
# ## Seeds
#
# Every image has its own random key, `fold_in(key(seed), index)`, from which all of its noise comes. The same seed
# gives the same images again, another seed gives others.

# %%
by_seed = {seed: pipe(image=PHOTO, num_images_per_prompt=8, seed=seed, **settings) for seed in (0, 1)}
labelled = [
    (image, f"seed {seed}, image {i}") for seed, run in by_seed.items() for i, image in enumerate(run.images[:4])
]
show([(PHOTO, PHOTO.stem)], labelled)

# %% [markdown]
# The key belongs to the image, not to the batch. Image 3 of seed 0 is therefore the same in batches of four (one more
# compilation) or on another number of devices, except for rounding.

# %%
import numpy as np

fours = pipe(image=PHOTO, num_images_per_prompt=8, seed=0, batch_size=4, **settings)
difference = np.abs(fours.latents - by_seed[0].latents).max() / np.abs(fours.latents).max()
print(f"the latents of two batches of 4 differ from those of one batch of 8 by {difference:.1g} of the largest value")

# %% [markdown]
# ## Prompts
#
# A prompt conditions the image through the text encoder and cross-attention, beside the image embedding. Where both
# describe the same thing, they compete. `noise_level`, 0 to 1000, noises the embedding before the model sees it: the
# image then counts less, and the text more. [The next notebook](02_noise_levels_and_mixing.ipynb) is about this. The
# demo model's captions were of the kind "tulip, blue background"; a real checkpoint understands whole sentences.
#
# There is one prompt per image, here four for the same one. Guidance ([Ho & Salimans
# 2022](https://arxiv.org/abs/2207.12598)) pulls towards both conditions at once.

# %%
prompts = ["", "blue background", "green background", "tulip, blue background"]
for noise_level in (0, 500):
    out = pipe(image=[PHOTO] * 4, prompt=prompts, noise_level=noise_level, num_images_per_prompt=2, seed=0, **settings)
    labels = [prompts[i // 2] or "no prompt" for i in range(8)]
    show([(PHOTO, f"noise level {noise_level}")], list(zip(out.images, labels, strict=True)))

# %% [markdown]
# At noise level 0 the backgrounds change, the green one faintly, and the image keeps the rest: the requested tulip
# has the fire engine's place and colour. At 500 it is a tulip.

# %% [markdown]
# ## Negative prompts
#
# Guidance extrapolates from the prediction without the conditions to the prediction with them. A negative prompt
# replaces "without": the image is moved away from it. It is not a logical *not*, but a direction to avoid.

# %%
negative = ["", "red", "blue", "fire engine, car"]
for prompt, noise_level in (("", 500), ("heart", 700)):
    out = pipe(
        image=[PHOTO] * 4,
        prompt=prompt,
        negative_prompt=negative,
        noise_level=noise_level,
        num_images_per_prompt=2,
        seed=0,
        **settings,
    )
    labels = [f"not: {negative[i // 2]}" if negative[i // 2] else "none" for i in range(8)]
    title = f"level {noise_level}, {prompt or 'no prompt'}"
    show([(PHOTO, title)], list(zip(out.images, labels, strict=True)))

# %% [markdown]
# Without *red*, the cars are yellow, and the requested heart is green or yellow, and half an apple. Without *blue*,
# most of the windows vanish. Without *fire engine, car*, the colour changes more than the thing: at 500 the image
# embedding still describes a car.

# %% [markdown]
# ## An image in the making
#
# `stream` is the same run as a generator of states, one after every network evaluation. `state.decode()` shows the
# network's current prediction of the end. The outline and the colours come first, while there is most noise; details
# come last. Leave the loop to stop at any step.

# %%
wanted = {1, 2, 4, 7, 11, 15, 18, 20}
shown = []
for state in pipe.stream(image=PHOTO, num_images_per_prompt=8, seed=0, **settings):
    if state.step in wanted:
        shown.append((state.decode()[1], f"step {state.step} of {state.num_steps}"))
show([], shown)

# %% [markdown]
# Next: [noise levels and mixtures of images](02_noise_levels_and_mixing.ipynb). Solvers, guidance and all other
# arguments are in [docs/pipelines.md](../docs/pipelines.md).
