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
# # Many devices
#
# The images of a batch are independent, so they can be made on as many devices as there are. You will see one
# sampling function run in four ways over eight devices (`jit` with a mesh, `shard_map`, `pmap`, and a pipeline by
# itself). All make the same images, since every image draws its noise from its own key.
#
# The eight devices are virtual ones on this CPU. The model is an unCLIP ([Ramesh et al.
# 2022](https://arxiv.org/abs/2204.06125)). Splitting one program over a mesh by annotations is GSPMD ([Xu et al.
# 2021](https://arxiv.org/abs/2105.04663)).

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
# XLA makes virtual devices of a CPU if this variable is set **before JAX is imported**; if JAX is already imported,
# restart the runtime. On a machine with several TPU cores or GPUs it has no effect on them: the same cells then use
# those. Virtual devices are not faster than the cores they share, which is why the model is small.
#
# With the real checkpoint the rest stays the same: eight images of 768x768, one per device. Each device holds a copy
# of the UNet (1.7 GB in bfloat16), and every way compiles separately, for a minute or more. Do not try it on eight
# virtual devices of a CPU: they share one memory. *Out of memory* (`RESOURCE_EXHAUSTED`): a mesh with a `"model"`
# axis, below, splits the weights; [docs/memory.md](../docs/memory.md) has more. A repository behind a form needs
# `HF_TOKEN`; this one does not.

# %%
import os

flags = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

import jax

print(f"{jax.device_count()} {jax.default_backend()} device(s)")
if jax.device_count() == 1:
    print("One device: restart the runtime and run from the top. In Colab, Runtime > Change runtime type has TPUs.")

# %% [markdown]
# ## A pure function
#
# The networks are functions of their parameters, and `sample` is pure. This function makes the latents of any images
# from their indices, text states and class labels. Image *i* draws its noise from its own key, `fold_in(key(seed),
# i)`, whatever device it is on. For guidance ([Ho & Salimans 2022](https://arxiv.org/abs/2207.12598)) the network
# gets each image twice, and `interleave` keeps the two rows neighbours: as two halves, from `concatenate`, they would
# not lie on the device of their image.

# %%
import jax.numpy as jnp
import numpy as np
from IPython.display import display
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import unclip_jax
from unclip_jax import local_mesh
from unclip_jax.conditioning import load_image
from unclip_jax.demo import demo_images
from unclip_jax.image_files import contact_sheet
from unclip_jax.models import timestep_embedding
from unclip_jax.sampling import Branch, draw, guide, image_keys, interleave, make_solver, sample

PHOTO = demo_images() / "fire-engine.png"  # any image for a real checkpoint
guidance_scale = 3.0 if CHECKPOINT is None else 10.0

pipe = unclip_jax.UnCLIPPipeline.from_pretrained(CHECKPOINT, mesh=local_mesh(jax.local_devices()[:1]))
unet, config = pipe.networks["unet"], pipe.config
solver = make_solver("ddim", config.scheduler_config, num_inference_steps=10)
size = config.unet.sample_size


def latents(params, seed, indices, text, labels):
    """Indices (B,), text states (B, T, C), class labels (B, 2 D) -> latents (B, size, size, 4)."""
    model = unet.merge(params)
    context = model.encode_context(interleave(text, text))
    classes = model.embed_class(interleave(0 * labels, labels))  # without the image, and with it
    keys = image_keys(seed, indices)

    def denoise(x, row):
        time = model.embed_time(jnp.full(2 * len(x), row["timestep"]))
        return guide(model.denoise(interleave(x, x), time + classes, context), guidance_scale)

    return sample(denoise, solver, draw(keys, Branch.LATENTS, (size, size, 4)), keys=keys)


# %% [markdown]
# The inputs, on the host: eight indices, the states of an empty prompt, and class labels, which are the image's
# embedding beside the sinusoids of noise level 0.

# %%
images, seed = 8, 3
embedding = pipe.encode_image_embeds([load_image(PHOTO)])
level = timestep_embedding(np.zeros(1, np.int32), embedding.shape[-1])
indices = np.arange(images)
labels = np.repeat(np.concatenate([embedding, level], axis=-1), images, axis=0)
text = np.repeat(pipe.encode_prompts([""]), images, axis=0)
params = jax.device_get(unet.params)
made = {}

# %% [markdown]
# ## One device
#
# The baseline that the others are compared with.

# %%
made["one device"] = np.asarray(jax.jit(latents)(params, seed, indices, text, labels))

# %% [markdown]
# ## `jit` with a mesh
#
# Start with this one. The program is written for the whole batch. Shardings declare that images are split along
# `"data"` and that weights are whole on each device, and the compiler splits the program.

# %%
mesh = local_mesh()  # all local devices along "data"
split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
by_jit = jax.jit(latents, in_shardings=(whole, whole, split, split, split), out_shardings=split)
with jax.set_mesh(mesh):  # known while tracing, so that attention kernels are given each device's own images
    program = by_jit.lower(params, seed, indices, text, labels).compile()  # by_jit(...) does this by itself
out = program(params, seed, indices, text, labels)
made["jit, mesh"] = np.asarray(out)

# %% [markdown]
# Images do not interact, so the compiled program holds no collective: devices never wait for one another.

# %%
words = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
collectives = sum(program.as_text().count(f" {word}(") for word in words)
print("collectives in the compiled program:", collectives)
assert collectives == 0
print(f"latents of {out.shape}, on each device {out.addressable_shards[0].data.shape}")

# %% [markdown]
# ## `shard_map`
#
# The function sees one device's share, here one image. Use it for code that calls collectives itself.

# %%
specs = (P(), P(), P("data"), P("data"), P("data"))
by_shard_map = jax.jit(jax.shard_map(latents, mesh=mesh, in_specs=specs, out_specs=P("data")))
made["shard_map"] = np.asarray(by_shard_map(params, seed, indices, text, labels))

# %% [markdown]
# ## `pmap`
#
# The oldest way: every array has a leading axis of devices. Use it for code that already has that axis.

# %%
devices = jax.local_device_count()
by_pmap = jax.pmap(latents, in_axes=(None, None, 0, 0, 0))
shares = (a.reshape(devices, -1, *a.shape[1:]) for a in (indices, text, labels))
out = by_pmap(params, seed, *shares)
made["pmap"] = np.asarray(out).reshape(-1, *out.shape[2:])

# %% [markdown]
# ## The same images
#
# Only rounding differs: a batch of eight and eight batches of one are summed in different orders.

# %%
reference = made["one device"]
for name, value in made.items():
    difference = np.abs(value - reference).max()
    print(f"{name:11} largest difference {difference:.1e}, of latents up to {np.abs(reference).max():.1f}")
    assert difference < 1e-2 * np.abs(reference).max() or jax.default_backend() != "cpu"  # bfloat16 rounds coarsely

# %%
shown = []
for name, value in made.items():
    decoded = pipe.decode_latents(value[:4])
    assert decoded.std() > 0.02, "the images are blank"
    shown += [(image, f"{name}, {i}") for i, image in enumerate(pipe.to_pil(decoded))]
display(contact_sheet([(PHOTO, PHOTO.stem)], shown, 4, 104).quantize())

# %% [markdown]
# ## A pipeline by itself
#
# A pipeline uses all devices by itself: it splits the images of a call along `"data"`, and pads and trims if they do
# not divide evenly. `mesh` gives another arrangement. Along `"model"` the weights are split, by an ordered table of
# names (`PARTITION_RULES`). Each device then holds a part of them, at the cost of one reduction per residual branch,
# as in Megatron ([Shoeybi et al. 2019](https://arxiv.org/abs/1909.08053)). Use it for models that one device cannot
# hold.

# %%
half = max(devices // 2, 1)
mesh = jax.make_mesh((half, devices // half), ("data", "model"))
both = unclip_jax.UnCLIPPipeline.from_pretrained(CHECKPOINT, mesh=mesh)
kernel = both.networks["unet"].params["mid_block.attentions.0.attn1.to_q.kernel"]
print(f"a kernel of {kernel.shape}, on each device {kernel.addressable_shards[0].data.shape}")

# %%
call = {"image": PHOTO, "num_images_per_prompt": 8, "num_inference_steps": 10, "guidance_scale": guidance_scale}
first, second = (p(**call, scheduler="ddim", seed=seed, output_type="latent").latents for p in (pipe, both))
print(f"one device and a mesh of {dict(mesh.shape)}: largest difference {np.abs(first - second).max():.1e}")

# %% [markdown]
# [docs/devices.md](../docs/devices.md) has gradients, and the same recipes, run by the tests.
