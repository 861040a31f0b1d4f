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
# # From an embedding
#
# An unCLIP model paints what an image embedding says, whoever made the embedding. It can therefore show what other
# models and instruments see: sounds ([ImageBind](https://arxiv.org/abs/2305.05665)), brain scans
# ([MindEye2](https://arxiv.org/abs/2403.11207)), EEG ([Li et al. 2024](https://arxiv.org/abs/2403.07721)). All that has
# to be learnt is a map into the space of CLIP's image embeddings, and often a linear one does.
#
# You will see such a map learnt in a second and its predictions painted, how well it does by three measures, and an
# embedding that is moved along a gradient until CLIP finds a text in it.

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
CLIP = CHECKPOINT  # both towers; of Stable Diffusion 2.1 unCLIP "open_clip:ViT-H-14/laion2b_s32b_b79k"

# %% [markdown]
# `None` is the [demo model](../docs/demo-model.md), which knows only drawings of emoji and makes images of 64x64
# pixels. Its text encoder is CLIP's, with its projection; published checkpoints come without that, so with them the
# texts are read by the CLIP model itself, named in `CLIP`.
#
# - *Out of memory* (`RESOURCE_EXHAUSTED`): give fewer embeddings to a call;
#   [docs/memory.md](../docs/memory.md) has more.
# - *A login is needed* (`PermissionError`): the repository is behind a form. Accept it there and set `HF_TOKEN`, in
#   Colab by the key at the left; the one named above needs none.

# %%
import jax

print(f"{jax.device_count()} {jax.default_backend()} device(s):", jax.devices())
if jax.default_backend() == "cpu" and CHECKPOINT is not None:
    print("No accelerator, which is slow with a real checkpoint. In Colab: Runtime > Change runtime type.")

# %%
import io

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from IPython.display import display
from PIL import Image

import unclip_jax
from unclip_jax import local_mesh, open_checkpoint
from unclip_jax.demo import demo_images
from unclip_jax.evaluation import clip_features, cosines

mesh = local_mesh(jax.local_devices()[:1])
pipe = unclip_jax.UnCLIPPipeline.from_pretrained(CHECKPOINT, mesh=mesh)
clip = clip_features(open_checkpoint(CLIP), mesh)  # clip.images and clip.texts: -> (N, D), un-normalised
settings = {"num_inference_steps": 12, "guidance_scale": 3.0 if CHECKPOINT is None else 10.0}


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# %% [markdown]
# A grid of images, with a label at each row.


# %%
def draw_grid(rows, labels, titles=None):
    columns = len(rows[0])
    size = (0.85 * columns + 1.5, 0.88 * len(rows) + 0.25)
    figure, axes = plt.subplots(len(rows), columns, figsize=size, dpi=72, squeeze=False, layout="constrained")
    for line, row, label in zip(axes, rows, labels, strict=True):
        for place, image in zip(line, row, strict=True):
            place.set(xticks=[], yticks=[], frame_on=False)
            place.imshow(image)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
    for place, title in zip(axes[0], titles or [], strict=False):
        place.set_title(title, fontsize=9)
    drawn = io.BytesIO()
    figure.savefig(drawn)
    plt.close(figure)
    display(Image.open(drawn).convert("RGB").quantize(256))


# %% [markdown]
# ## Another encoder
#
# The package's 48 drawings stand for what somebody saw. Every fourth is held out: no copy of it is used to learn the
# map. (None of the 48 was seen by the demo model.) Of each of the others there are 24 copies, moved, mirrored, and
# half of them with exchanged colours.

# %%
rng = np.random.default_rng(0)
paths = sorted(demo_images().glob("*.png"))
drawings = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
held = drawings[::4]
names = [path.stem.replace("-", " ") for path in paths[::4]]


def copy_of(drawing):
    moved = np.roll(drawing[:, :: rng.choice([-1, 1])], rng.integers(-4, 5, 2), (0, 1))
    return moved[..., rng.permutation(3)] if rng.random() < 0.5 else moved


seen = [drawing for index, drawing in enumerate(drawings) if index % 4]
copies = [copy_of(drawing) for drawing in seen for _ in range(24)]
concept = np.repeat(np.arange(len(seen)), 24)
print(f"{len(copies)} copies of {len(seen)} drawings to learn from, {len(held)} drawings held out")

# %% [markdown]
# The instrument is made up, as there is none on this machine. It has 400 channels, each of which looks at a blurred
# stripe pattern of one colour at one place, as a model of a voxel in the visual cortex does ([Kay et al.
# 2008](https://doi.org/10.1038/nature06713)), saturates, and is noisy. In its place put the recordings, or the
# embeddings of another model: any array with a row for each image.


# %%
def receptive_fields(channels=400, size=64):
    """(channels, size, size, 3), of norm 1."""
    own = np.random.default_rng(1)
    y, x = np.mgrid[:size, :size] / size
    (cy, cx), width, stripes, angle, phase = (
        own.uniform(low, high, (*shape, channels, 1, 1))
        for low, high, shape in ((0, 1, (2,)), (0.05, 0.2, ()), (0, 8, ()), (0, np.pi, ()), (0, 2 * np.pi, ()))
    )
    wave = np.cos(2 * np.pi * stripes * (x * np.cos(angle) + y * np.sin(angle)) + phase)
    field = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * width**2)) * wave
    field = field[..., None] * own.standard_normal((channels, 1, 1, 3))
    return field / np.linalg.norm(field.reshape(channels, -1), axis=1)[:, None, None, None]


fields = receptive_fields()


def record(images, noise, seed):
    """Images (64, 64, 3) -> (N, channels)."""
    pixels = np.stack(images).reshape(len(images), -1) / 255 - 0.5
    clean = np.tanh(pixels @ fields.reshape(len(fields), -1).T / 3)
    return clean + noise * np.random.default_rng(seed).standard_normal(clean.shape)


draw_grid([[(field / np.abs(field).max() + 1) / 2 for field in fields[:12]]], ["12 channels"])

# %% [markdown]
# ## The map
#
# The embeddings are those of the model's own image encoder. Ridge regression has a closed form: $W = (X^T X + \lambda
# I)^{-1} X^T Y$, around the means. $\lambda$ is chosen by leaving out whole drawings, not copies: copies of one drawing
# on both sides would favour a map that knows the drawings by heart.

# %%
embeds, truth = clip.images(copies), clip.images(held)
mean = embeds.mean(0)


def ridge(x, y, strength):
    """The map as a function of rows."""
    x_mean, y_mean = x.mean(0), y.mean(0)
    around = x - x_mean
    weights = np.linalg.solve(around.T @ around + strength * np.eye(x.shape[1]), around.T @ (y - y_mean))
    return lambda rows: (rows - x_mean) @ weights + y_mean


def learn(x):
    """The map, and the strength that was best on a quarter of the drawings."""
    out = concept % 4 == 0

    def score(strength):
        return cosines(ridge(x[~out], embeds[~out], strength)(x[out]) - mean, embeds[out] - mean).mean()

    best = max([1, 10, 100, 1000, 10000], key=score)
    return ridge(x, embeds, best), best


# %% [markdown]
# Two measures need no picture. The cosine to the true embedding is taken around the mean, since embeddings of all
# images have much in common. The rank is the place of the true embedding among the 12 that were held out, by that
# cosine: 1 is best, and chance is 6.5.


# %%
def ranks(predicted):
    """(N,): how many of the true embeddings are at least as near as the right one."""
    nearness = unit(predicted - mean) @ unit(truth - mean).T
    return (nearness >= np.diag(nearness)[:, None]).sum(1)


predicted = {}
print("noise  strength  cosine  mean rank  first")
for noise in (0.1, 0.3, 1.0, 3.0):
    apply, strength = learn(record(copies, noise, seed=2))
    predicted[noise] = apply(record(held, noise, seed=3))
    place = ranks(predicted[noise])
    cosine = cosines(predicted[noise] - mean, truth - mean).mean()
    print(f"{noise:5}  {strength:8}  {cosine:6.2f}  {place.mean():9.1f}  {np.mean(place == 1):5.0%}")

# %% [markdown]
# ## Painted
#
# Embeddings go to a call as `image_embeds`. The second row is made from the true embeddings, which is what a perfect
# map would give. Then the predictions, from better and worse recordings.

# %%
together = {**settings, "seed": 0}
made = {"truth": pipe(image_embeds=truth, **together).images}
for noise in (0.1, 1.0):
    made[f"noise {noise}"] = pipe(image_embeds=predicted[noise].astype(np.float32), **together).images
draw_grid([held, *made.values()], ["seen", *made])

# %% [markdown]
# Colours and outlines arrive, and what kind of thing it is, as far as the demo model can tell. From noisy recordings
# ridge regression predicts what is certain, which is little: the embeddings shrink to their mean, and the images become
# vague.
#
# The model can be told how far to trust an embedding. At a higher `noise_level` it keeps the coarse part and makes up
# the rest: more of a thing, and less of the thing that was seen.

# %%
made["noise 1.0, level 500"] = pipe(image_embeds=predicted[1.0].astype(np.float32), noise_level=500, **together).images
draw_grid([held, made["noise 1.0"], made["noise 1.0, level 500"]], ["seen", "level 0", "level 500"])

# %% [markdown]
# ## How well?
#
# The images are measured by their own embeddings: the cosine to the truth, the rank as above, and the CLIP score, the
# cosine to the embedding of the thing's name. By chance, that is, with the names exchanged, it has another value, which
# has to be told with it. The judge here is the encoder that the map was learnt for, which flatters; a study takes
# another one, and several seeds.

# %%
texts = clip.texts(names)
print("                      cosine  mean rank  CLIP score  by chance")
for label, images in {"the drawings": held, **made}.items():
    judged = clip.images([np.asarray(image) for image in images])
    every = unit(judged) @ unit(texts).T
    chance = every[~np.eye(len(names), dtype=bool)].mean()
    cosine = cosines(judged - mean, truth - mean).mean()
    print(f"{label:20}  {cosine:6.2f}  {ranks(judged).mean():9.1f}  {np.diag(every).mean():10.2f}  {chance:9.2f}")

# %% [markdown]
# ## Towards a text
#
# CLIP's other tower reads texts into the same space. From the mean of all embeddings, Adam climbs the cosine to a
# text's embedding. All of it is one compiled scan, `vmap`ped over the texts.

# %%
wanted = ["tulip", "red heart", "cat face"]
targets = jnp.asarray(clip.texts(wanted))
optimizer = optax.adam(0.02)


def cosine_to(target, embed):
    return embed @ target / jnp.linalg.norm(embed) / jnp.linalg.norm(target)


@jax.jit
@jax.vmap
def climb(target):
    """(D,) -> the embedding before each update, (updates, D)."""

    def update(carry, _):
        embed, state = carry
        change, state = optimizer.update(-jax.grad(cosine_to, argnums=1)(target, embed), state)
        return (optax.apply_updates(embed, change), state), embed

    return jax.lax.scan(update, (jnp.asarray(mean), optimizer.init(mean)), length=301)[1]


shown = (0, 20, 50, 300)
way = np.asarray(climb(targets))[:, shown]  # (texts, shown, D)
asked = np.array([[cosine_to(target, embed) for embed in line] for target, line in zip(targets, way, strict=True)])

# %% [markdown]
# The cosine does not see how long an embedding is, but the denoiser does, and on the way the length changes. In the
# second row the same embeddings have the length that those of images have.

# %%
length = np.linalg.norm(embeds, axis=1).mean()
rows, reached = [], {}
for label, embed in {"as climbed": way, "at images' length": length * unit(way)}.items():
    images = pipe(image_embeds=embed.reshape(-1, len(mean)), seed=[0] * 12, **settings).images
    rows.append(images)
    scores = cosines(clip.images([np.asarray(image) for image in images]), np.repeat(targets, len(shown), axis=0))
    reached[label] = scores.reshape(asked.shape)
draw_grid(rows, list(reached), [f"{count}" if count else name for name in wanted for count in shown])

# %%
figure, axes = plt.subplots(figsize=(5.5, 2.8), dpi=72, layout="constrained")
axes.plot(shown, asked.mean(0), "0.7", ls="--", marker="o", label="of the embedding itself")
for label, scores in reached.items():
    axes.plot(shown, scores.mean(0), marker="o", label=f"of the image, {label}")
axes.set(xlabel="updates", ylabel="CLIP score", title="Mean of three texts")
axes.legend(fontsize=8)
axes.grid(alpha=0.3)
plt.show()
assert reached["at images' length"][:, -1].mean() > 0.1 + reached["as climbed"][:, -1].mean()

# %% [markdown]
# The denoiser was given no prompt: what it paints comes from the embedding. In the end that is nearly the text's own,
# which no image has, since images and texts lie in different parts of the space; the image keeps about two thirds of
# the cosine that the embedding promises. So measure the image. Any differentiable function of an embedding can take
# the place of the cosine: a classifier, another model's score, the answer of a neuron.
#
# [docs/training.md](../docs/training.md#in-your-own-code) has a loop for a network in the place of the linear map, and
# [02_noise_levels_and_mixing](02_noise_levels_and_mixing.ipynb) more about levels. A prior, which makes embeddings of
# texts, is in [07_the_family](07_the_family.ipynb).
