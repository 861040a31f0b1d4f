"""The same random UNet for both libraries: a folder that diffusers writes, and our network filled from it."""

import contextlib
import multiprocessing
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def full_size(width: int) -> dict[str, Any]:
    """diffusers' configuration of the UNet of Stable Diffusion 2.1 unCLIP. width: of the first level, 320 there."""
    return {
        "block_out_channels": [width, 2 * width, 4 * width, 4 * width],
        "attention_head_dim": [max(width // 64, 1), width // 32, width // 16, width // 16],
        "cross_attention_dim": 1024,
        "layers_per_block": 2,
        "use_linear_projection": True,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 2048,
        "sample_size": 96,
    }


@contextlib.contextmanager
def random_folder(config: Mapping[str, Any]) -> Iterator[str]:
    """A folder with random weights, written in a process of its own, whose memory then counts for nobody."""
    with tempfile.TemporaryDirectory() as folder:
        writer = multiprocessing.get_context("spawn").Process(target=write_random, args=(folder, dict(config)))
        writer.start()
        writer.join()
        if writer.exitcode != 0:
            raise SystemExit("diffusers could not write a UNet; this benchmark needs the extra `parity`")
        yield folder


def write_random(folder: str, config: dict[str, Any]) -> None:
    """Random weights as diffusers begins with them, and their configuration."""
    from diffusers import UNet2DConditionModel

    UNet2DConditionModel(**config).save_pretrained(folder)


def read_unet(folder: str, **options: Any) -> Any:
    """The folder's weights in our network. options: of `abstract_network`, as dtype and remat."""
    import jax.numpy as jnp

    from convert.architecture import diffusers
    from convert.engine import Table, import_params
    from convert.readers import open_tensors
    from convert.rules import unet
    from convert.weights import weights_file
    from unclip_jax.checkpoints.networks import abstract_network, fill
    from unclip_jax.compilation import use_compilation_cache
    from unclip_jax.models.unet import UNet

    use_compilation_cache()
    config = diffusers.read_unet(Path(folder))
    network = abstract_network(UNet, config, **options)
    params = {f"unet.{name}": spec for name, spec in network.params.items()}
    table = Table(params)
    unet.diffusers(table, "", config)
    with open_tensors(weights_file(Path(folder), None)) as file:
        read = import_params(table.rules, params, file.tensors, file.read)
        return fill(network, lambda name: read[f"unet.{name}"].read(), lambda name, array: jnp.array(array))
