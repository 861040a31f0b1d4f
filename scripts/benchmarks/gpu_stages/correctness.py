"""How far from the original's own float32 values, as recorded on a CPU: tests/golden."""

import json
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.architecture.presets import PRESETS
from gpu_stages.run import Add, Row, Run, first_line
from tests.golden_weights import GOLDEN, full_size_network, write_model
from turns import difference
from unclip_jax import UnCLIPPipeline
from unclip_jax.checkpoints.networks import abstract_networks
from unclip_jax.distributed.mesh import local_mesh

MODEL = "unclip_h"
CASES = (f"{MODEL}_ddim_defaults", f"{MODEL}_dpm")
# dtype, JAX's matmul precision, and the bound of relative L2: None for what is only of interest. On a CPU bfloat16 is
# 1.9e-2 away for the UNet and 2.2e-2 for the decoder.
PRECISIONS = (("float32", None, 2e-5), ("float32", "tensorfloat32", None), ("bfloat16", None, 3e-2))
TRAJECTORY_BOUND = 5e-5


def measure(run: Run, add: Add) -> None:
    for row in trajectories(CASES if run.full_size else CASES[:1]):
        add(row)
    if not run.full_size:
        add({"what": "networks of full size", "left_out": "--width is not 320"})
        return
    recorded = np.load(GOLDEN / "full_size.npz")
    unet = [recorded[f"unet_{name}"] for name in ("x", "t", "context", "classes")]
    networks(add, "unet", lambda unet, *given: unet(*given), unet, recorded["unet_out"])
    networks(add, "vae", lambda vae, z: vae.decode(z)[:, ::4, ::4], [recorded["vae_z"]], recorded["vae_decoded"])


def trajectories(names: Sequence[str]) -> list[Row]:
    """Whole runs of a reduced model from the recorded embedding and noise to its latents, in float32."""
    recorded = np.load(GOLDEN / "trajectories.npz")
    cases = json.loads((GOLDEN / "trajectories.json").read_text("utf-8"))["cases"]
    model, rows = GOLDEN / "models" / MODEL, []
    with tempfile.TemporaryDirectory() as folder:
        file = write_model(MODEL, Path(folder) / f"{MODEL}.safetensors")
        mesh = local_mesh(jax.local_devices()[:1])
        pipe = UnCLIPPipeline.from_pretrained(file, "float32", mesh, config=model / "config.yaml")
    pipe.progress = False
    for name in names:
        case, start = cases[name], recorded[f"{name}_start"]
        made = pipe(
            latents=start,
            image_embeds=recorded[f"{name}_image_embeds"],
            image_noise=recorded[f"{name}_image_noise"],
            prompt_embeds=recorded[f'states of "{case["prompt"]}"'],
            negative_prompt_embeds=recorded[f'states of "{case["negative_prompt"]}"'],
            num_images_per_prompt=len(start),
            height=8 * start.shape[1],
            width=8 * start.shape[2],
            output_type="latent",
            **{key: case[key] for key in ("scheduler", "num_inference_steps", "guidance_scale", "noise_level")},
        )
        far = difference(made.latents, recorded[f"{name}_end"])
        rows.append({"what": f"run {name}", "dtype": "float32", "relative_l2": far, "bound": TRAJECTORY_BOUND})
    return rows


def networks(add: Add, name: str, call: Callable[..., Any], given: list[np.ndarray], want: np.ndarray) -> None:
    """One network of full size with the recordings' weights, in every precision, compiled side by side."""
    network = full_size_network(name)

    def one(case: tuple[str, str | None, float | None]) -> Row:
        dtype, precision, bound = case
        row: Row = {"what": name, "dtype": f"{dtype} {precision or ''}".strip(), "bound": bound}
        params = {key: array.astype(dtype) for key, array in network.params.items()}
        structure = abstract_networks(PRESETS["sd21-unclip-h"], jnp.dtype(dtype))[name]
        try:
            with jax.default_matmul_precision(precision):
                out = jax.jit(lambda params, *given: call(structure.merge(params), *given))(params, *given)
            return row | {"relative_l2": difference(out, want)}
        except Exception as error:
            return row | {"error": first_line(error)}

    with ThreadPoolExecutor() as pool:
        for row in pool.map(one, PRECISIONS):
            add(row)
