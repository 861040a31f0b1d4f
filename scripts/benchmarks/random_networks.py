"""A random network, the same for all libraries: a folder that one of them writes, and ours filled from it."""

import contextlib
import dataclasses
import importlib
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


def component_config(component: str, config: Any) -> dict[str, Any]:
    """The configuration that diffusers or transformers has for ours of a component."""
    from convert.architecture.presets import PRESETS
    from convert.export.diffusers_configs import diffusers_configs

    whole = dataclasses.replace(PRESETS["sd21-unclip-h"], **{component: config})
    return diffusers_configs(whole, "float32")[f"{component}/config.json"]


@contextlib.contextmanager
def random_folder(config: Mapping[str, Any], component: str = "unet") -> Iterator[str]:
    """A folder with random weights, written in a process of its own, whose memory then counts for nobody.

    component: as in a diffusers folder; config: its class's configuration.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        writer = context.Process(target=write_random, args=(folder, dict(config), component))
        writer.start()
        writer.join()
        if writer.exitcode != 0:
            raise SystemExit(f"the random {component} could not be written; this benchmark needs the extra `parity`")
        yield folder


def write_random(folder: str, config: dict[str, Any], component: str = "unet") -> None:
    """Random weights as the library begins with them, and their configuration."""
    from convert.architecture.diffusers import COMPONENTS

    library, name = COMPONENTS[component]
    cls = getattr(importlib.import_module(library), name)
    network = cls.from_config(config) if library == "diffusers" else cls(cls.config_class(**config))
    network.save_pretrained(folder)


def read_unet(folder: str, **options: Any) -> Any:
    """The folder's weights in our network. options: of `abstract_network`, as dtype and remat."""
    from convert.architecture import diffusers

    return read_network("unet", folder, diffusers.read_unet(Path(folder)), **options)


def read_network(component: str, folder: str, config: Any, **options: Any) -> Any:
    """The same of any component. config: ours."""
    import jax.numpy as jnp

    from convert.engine import Table, import_params
    from convert.folder_weights import weights_file
    from convert.readers import open_tensors
    from convert.rules import clip, unet, vae
    from convert.rules.diffusers import canonical
    from unclip_jax.checkpoints.networks import NETWORKS, abstract_network, fill
    from unclip_jax.compilation import use_compilation_cache

    rules: dict[str, Any] = {
        "unet": unet.diffusers,
        "vae": vae.diffusers,
        "text_encoder": clip.transformers_text,
        "image_encoder": clip.transformers_vision,
    }
    use_compilation_cache()
    network = abstract_network(NETWORKS[component], config, **options)
    params = {f"{component}.{name}": spec for name, spec in network.params.items()}
    table = Table(params)
    rules[component](table, f"{component}/", config)
    with open_tensors(weights_file(Path(folder), None)) as file:
        names = {canonical(f"{component}/{name}"): name for name in file.tensors}
        tensors = {name: file.tensors[written] for name, written in names.items()}
        read = import_params(table.rules, params, tensors, lambda name: file.read(names[name]))
        return fill(network, lambda name: read[f"{component}.{name}"].read(), lambda name, array: jnp.array(array))


def as_pipelines_do(part: str, network: Any, dtype: str, lean: bool) -> tuple[Any, dict[str, str]]:
    """The parameters that a pipeline's programs read on one device, and what it tells the compiler.

    lean: without transformed kernels. The network's own parameters stay, as they do in a pipeline.
    """
    import jax

    from unclip_jax.compilation import compiler_options
    from unclip_jax.distributed.mesh import local_mesh
    from unclip_jax.pipelines.memory import Memory
    from unclip_jax.pipelines.prepared import make_kernels

    mesh = local_mesh(jax.local_devices()[:1])
    kernels = make_kernels({part: network}, mesh, dtype, Memory(convolution="direct" if lean else None))
    params = network.params if kernels is None else kernels.weights(part, network.params, progress=False)
    return params, compiler_options(mesh, dtype, tower=part in ("image_encoder", "text_encoder"))
