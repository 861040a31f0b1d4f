"""Blocks of the pages in docs that need something around them; devices.md is run by distributed/test_recipes.py."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from tests.readme import ROOT
from unclip_jax import UnCLIPPipeline
from unclip_jax.distributed.mesh import local_mesh
from unclip_jax.sampling import Branch, draw, image_keys, make_solver


def test_guidance_from_the_parts(small_model):
    page = (ROOT / "docs" / "guidance.md").read_text("utf-8")
    (section,) = re.findall(r"^## From the parts$(.*?)^## ", page, re.DOTALL | re.MULTILINE)
    (block,) = re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    pipe = UnCLIPPipeline.from_pretrained(small_model, "float32", local_mesh(jax.local_devices()[:1]))
    network = pipe.networks["unet"]
    model, keys = network.merge(network.params), image_keys(0, jnp.arange(2))

    class WithoutLabels:
        """The page's UNet has no class labels; this one's are zeros, which its time embedding then holds."""

        encode_context, perturb_attention, denoise = model.encode_context, model.perturb_attention, model.denoise

        @staticmethod
        def embed_time(timesteps):
            labels = jnp.zeros((len(timesteps), pipe.config.unet.class_embedding_size))
            return model.embed_time(timesteps) + model.embed_class(labels)

    text = jnp.asarray(pipe.encode_prompts(["a cat", ""]))
    names = {
        "unet": WithoutLabels,
        "solver": make_solver("ddim", pipe.config.scheduler_config, 2),
        "noise": draw(keys, Branch.LATENTS, (8, 8, 4)),
        "prompt": text[:1].repeat(2, axis=0),
        "negative": text[1:].repeat(2, axis=0),
        "keys": keys,
    }
    exec(compile(block, "docs/guidance.md", "exec"), names)
    assert names["latents"].shape == (2, 8, 8, 4)
    assert np.isfinite(names["latents"]).all()
