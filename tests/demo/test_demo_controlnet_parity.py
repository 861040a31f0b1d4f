"""The demo model's ControlNet as diffusers runs it."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel

from convert import save_diffusers
from unclip_jax import ControlNet
from unclip_jax.checkpoints import open_controlnet

pytestmark = pytest.mark.parity


def test_diffusers_makes_the_same_of_it(tmp_path):
    with open_controlnet() as checkpoint:
        save_diffusers(checkpoint, tmp_path / "theirs")
    theirs = ControlNetModel.from_pretrained(tmp_path / "theirs", torch_dtype=torch.float32).eval()
    ours = ControlNet.from_pretrained(dtype="float32").network.merge()
    rng = np.random.default_rng(0)
    shapes = {"x": (2, 16, 16, 4), "context": (2, 16, 128), "hint": (2, 64, 64, 3)}
    given = {name: rng.random(shape, np.float32) for name, shape in shapes.items()}
    steps = np.array([10, 700])
    made = ours(given["x"], jnp.asarray(steps), given["context"], given["hint"])
    x, hint = (torch.tensor(given[name]).permute(0, 3, 1, 2) for name in ("x", "hint"))
    with torch.no_grad():
        down, middle = theirs(x, torch.tensor(steps), torch.tensor(given["context"]), hint, return_dict=False)
    assert len(made) == len(down) + 1
    for mine, their in zip(made, [*down, middle], strict=True):
        wanted = their.permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(mine, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())  # 9e-7 measured
