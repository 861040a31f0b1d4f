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
# An image goes in, images like it come out. You will see variations of one drawing and of several, what a seed
# fixes, what a prompt adds and a negative prompt takes away, and an image while it is being made.
#
# The model is Stable unCLIP: a latent diffusion model ([Rombach et al. 2021](https://arxiv.org/abs/2112.10752)) that
# paints what a CLIP image embedding says, as the decoder of unCLIP does
# ([Ramesh et al. 2022](https://arxiv.org/abs/2204.06125)).

# %%
# Colab has no copy of the package. Say where yours is: a git address as here, or a wheel that you uploaded
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
# `None` is the [demo model](../docs/demo-model.md): all parts of the real one, with 6.3 million weights, trained on
# drawings of emoji. It runs on a CPU, knows nothing but drawings, and makes images of 64x64 pixels.
#
# The real checkpoint is a hub id, a diffusers folder, or an original `.ckpt` or `.safetensors` file. The rest of this
# notebook stays as it is; what to expect:
#
# - Images of 768x768, of photographs as well. Weights of 7.2 GiB in float32 (the default on a CPU) and half of that
#   in bfloat16 (on accelerators): a GPU or a TPU is what you want. The first call compiles for a minute or more.
# - *Out of memory* (`RESOURCE_EXHAUSTED`): `batch_size=1` in a call, or
#   `memory=unclip_jax.Memory(free_networks=True, decoding="seamless")` in `from_pretrained`;
#   [docs/memory.md](../docs/memory.md) has more.
# - *A login is wanted* (`PermissionError`): that is a repository behind a form. Accept it there and set `HF_TOKEN`, in
#   Colab by the key at the left; the one named above needs none.

# %%
import jax

print(f"{jax.device_count()} {jax.default_backend()} device(s):", jax.devices())
if jax.default_backend() == "cpu" and CHECKPOINT is not None:
    print("No accelerator, which is slow with a real checkpoint. In Colab: Runtime > Change runtime type.")

# %% [markdown]
# What differs between the two models is set here. Stable Diffusion is used with a guidance scale of about 10, the small
# model with 3. `PHOTO` may be the path of any image; since the demo model knows drawings only, it is one of those
# which come with the package and which it has not seen in training.

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
# The image is embedded by CLIP's image encoder: one vector, which says what there is and hardly where. From noise of
# its own, each image is then denoised towards that vector in 20 steps. So variations keep content, colours and style,
# and differ in all that the embedding leaves open.
#
# The first call compiles; later ones of the same shape do not. `contact_sheet` puts images beside their source.

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
# A list makes variations of each, those of one image side by side. Four images with two variations are eight images
# as before, so nothing compiles.

# %%
paths = [demo_images() / f"{name}.png" for name in ("red-apple", "giraffe", "pink-heart", "lady-beetle")]
out = pipe(image=paths, num_images_per_prompt=2, seed=0, **settings)
show(
    [(path, path.stem) for path in paths],
    [(image, f"{paths[i // 2].stem} {i % 2}") for i, image in enumerate(out.images)],
    columns=2,
)

# %% [markdown]
# The lady beetle becomes a dark round thing: the model has seen no nearer drawing.
#
# ## Seeds
#
# Every image has its own random key, `fold_in(key(seed), index)`, and draws all of its noise by that. A seed gives the
# same images again, and another seed gives others.

# %%
by_seed = {seed: pipe(image=PHOTO, num_images_per_prompt=8, seed=seed, **settings) for seed in (0, 1)}
labelled = [
    (image, f"seed {seed}, image {i}") for seed, run in by_seed.items() for i, image in enumerate(run.images[:4])
]
show([(PHOTO, PHOTO.stem)], labelled)

# %% [markdown]
# Since the key is the image's and not the batch's, image 3 of seed 0 is image 3 of seed 0 in any company: in batches of
# four (one more compilation) or on another number of devices. What is left is rounding.

# %%
import numpy as np

fours = pipe(image=PHOTO, num_images_per_prompt=8, seed=0, batch_size=4, **settings)
difference = np.abs(fours.latents - by_seed[0].latents).max() / np.abs(fours.latents).max()
print(f"the latents of two batches of 4 differ from those of one batch of 8 by {difference:.1g} of the largest value")

# %% [markdown]
# ## Prompts
#
# A text goes beside the image, through the text encoder and cross-attention. Where both speak of the same thing, they
# compete. `noise_level`, 0 to 1000, noises the embedding before the model sees it: the image then says less, and the
# text decides more. [The next notebook](02_noise_levels_and_mixing.ipynb) is about this. The demo model's captions were
# of the kind "tulip, blue background"; a real checkpoint understands whole sentences.
#
# There is one prompt an image, here four for the same one. Guidance
# ([Ho & Salimans 2022](https://arxiv.org/abs/2207.12598)) pulls towards both conditions at once.

# %%
prompts = ["", "blue background", "green background", "tulip, blue background"]
for noise_level in (0, 500):
    out = pipe(image=[PHOTO] * 4, prompt=prompts, noise_level=noise_level, num_images_per_prompt=2, seed=0, **settings)
    labels = [prompts[i // 2] or "no prompt" for i in range(8)]
    show([(PHOTO, f"noise level {noise_level}")], list(zip(out.images, labels, strict=True)))

# %% [markdown]
# At noise level 0 the backgrounds change, the green one faintly, and the image keeps the rest: what was to be a tulip
# has the fire engine's place and colour. At 500 it is a tulip.

# %% [markdown]
# ## Negative prompts
#
# Guidance extrapolates from what the network says without the conditions to what it says with them. A negative prompt
# takes the place of "without": the image is moved away from it. It is no logical *not*; it says in which direction not
# to go.

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
# Not *red*: the cars are yellow, and where a heart was asked for, it is green or yellow, and half an apple. Not *blue*
# takes most of the windows. Not *fire engine, car* moves the colour more than the thing: at 500 the image still says
# car.

# %% [markdown]
# ## An image in the making
#
# `stream` is the same run as a generator, a state after every network call. `state.decode()` shows what the network
# then takes for the end. The outline and the colours come first, when there is most noise; details come last. Stop at
# any step by leaving the loop.

# %%
wanted = {1, 2, 4, 7, 11, 15, 18, 20}
shown = []
for state in pipe.stream(image=PHOTO, num_images_per_prompt=8, seed=0, **settings):
    if state.step in wanted:
        shown.append((state.decode()[1], f"step {state.step} of {state.num_steps}"))
show([], shown)

# %% [markdown]
# Next: [noise levels and mixtures of images](02_noise_levels_and_mixing.ipynb). Solvers, guidance and everything that
# a call takes are in [docs/pipelines.md](../docs/pipelines.md).
