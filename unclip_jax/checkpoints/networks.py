"""Networks without weights, and filling them: built abstractly, filled by name, shape and dtype onto their devices."""

import contextlib
import dataclasses
import functools
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax import executables
from unclip_jax.checkpoints.atomic import replaced_file
from unclip_jax.checkpoints.config import AnyConfig, CheckpointConfig, ClipConfig, PriorCheckpointConfig
from unclip_jax.models.configs import AutoencoderTinyConfig

Place = Callable[[str, np.ndarray], jax.Array]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["graphdef"])
@dataclasses.dataclass(frozen=True)
class Network:
    """A network split into its structure and its parameters, as compiled functions take it: `net.merge(net.params)`.

    Args:
        graphdef: flax's static description of the module, or how it is made.
        params: Dotted names -> arrays. A plain pytree, so it can be an argument of `jit`, `grad` and `pmap`.
    """

    graphdef: Any
    params: dict[str, Any]

    def merge(self, params: Mapping[str, jax.Array] | None = None) -> Any:
        """The callable flax module with these parameters (by default the network's own)."""
        from flax import nnx  # here, as everywhere in this module: with executables nobody needs it

        params = self.params if params is None else params
        graphdef = self.graphdef.graphdef if isinstance(self.graphdef, Structure) else self.graphdef
        # Bare arrays: what else is known of a parameter is in the structure.
        return nnx.merge(graphdef, nnx.from_flat_state([(_keys(k), v) for k, v in params.items()]))


@dataclasses.dataclass(frozen=True)
class Structure:
    """How a network is built. Flax's description of it is made where somebody merges it: with executables nobody does.

    Args:
        cls: The flax module's class, as "module:name".
        config: Its configuration.
        dtype, param_dtype: Of computation and of storage.
        options: Other arguments of the class.
    """

    cls: str
    config: Any
    dtype: Any
    param_dtype: Any
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def graphdef(self) -> Any:
        return self._split[0]

    @functools.cached_property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The parameters: dotted names -> shape and dtype. Kept in a file, as building a network takes a while."""
        folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # made at run time
        if folder is None:
            return self._split[1]
        file = Path(folder) / "shapes" / f"{executables.digest((self, executables.code()))}.json"
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            kept = json.loads(file.read_text("utf-8"))
            return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in kept.items()}
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            with replaced_file(file) as partial:
                partial.write_text(json.dumps({k: (v.shape, v.dtype.name) for k, v in self._split[1].items()}), "utf-8")
        return self._split[1]

    @functools.cached_property
    def _split(self) -> tuple[Any, dict[str, jax.ShapeDtypeStruct]]:
        from flax import nnx

        rngs: Any = _NoKeys()
        cls = network_class(self.cls)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        graphdef, state = nnx.split(nnx.eval_shape(lambda: cls(self.config, **types, rngs=rngs, **dict(self.options))))
        flat = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
        return graphdef, {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in flat.items()}


def network_class(path: str) -> Any:
    """The class that `NETWORKS` names, as "module:name"."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def part(params: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The parameters of one network among several: "name.parameter" -> value becomes "parameter" -> value.

    Args:
        params: The parameters of several networks.
        name: The network's name.

    Returns:
        The network's parameters under their own names.
    """
    return {key.removeprefix(f"{name}."): value for key, value in params.items() if key.startswith(f"{name}.")}


def _keys(path: str) -> tuple[Any, ...]:
    return tuple(int(part) if part.isdigit() else part for part in path.split("."))


# The networks that a checkpoint may have: the name of its part, and of the field that configures it -> the class.
NETWORKS = {
    "unet": "unclip_jax.models.unet:UNet",
    "vae": "unclip_jax.models.vae:VAE",
    "text_encoder": "unclip_jax.models.clip:TextEncoder",
    "image_encoder": "unclip_jax.models.clip:VisionEncoder",
    "depth_estimator": "unclip_jax.models.depth:DepthEstimator",
    "prior": "unclip_jax.models.prior:Prior",
    "controlnet": "unclip_jax.models.controlnet:ControlNetModel",
}
TINY_VAE = "unclip_jax.models.tiny_autoencoder:AutoencoderTiny"


def class_of(name: str, config: Any) -> str:
    """The class of a part with this configuration, as "module:name"."""
    return TINY_VAE if isinstance(config, AutoencoderTinyConfig) else NETWORKS[name]


def abstract_networks(
    config: AnyConfig, dtype: Any = jnp.float32, attention_chunk: int | None = None
) -> dict[str, Network]:
    """Every network of a checkpoint with `jax.ShapeDtypeStruct` parameters; nothing is allocated.

    Args:
        config: The checkpoint's configuration.
        dtype: The dtype of computation and of storage.
        attention_chunk: Of the UNet, the VAE and a ControlNet, see there.

    Returns:
        name -> network, for those of `NETWORKS` that the checkpoint has.
    """
    networks = {}
    for name in NETWORKS:
        if (part := getattr(config, name, None)) is not None:
            cls = class_of(name, part)
            chunked = name in ("unet", "vae", "controlnet") and cls != TINY_VAE
            options = {"attention_chunk": attention_chunk} if chunked else {}
            networks[name] = abstract_network(cls, part, dtype, **options)
    return networks


def head_width(config: AnyConfig, name: str) -> int:
    """Neighbouring features of a network's attention that belong to the same heads; 1 where it has none to split.

    Args:
        config: The checkpoint's configuration.
        name: Of the network, or of another part of the checkpoint.
    """
    width: int = getattr(getattr(config, name, None), "head_width", 1)
    return width


@functools.cache
def abstract_network(
    cls: Any, config: Any, dtype: Any = jnp.float32, param_dtype: Any = None, **options: Any
) -> Network:
    """The structure and parameter shapes of `cls(config, **options)`; nothing is allocated.

    Args:
        cls: The flax module's class, or "module:name".
        config: Its configuration.
        dtype: The dtype of computation.
        param_dtype: The dtype of storage; None for the same.
        **options: Other arguments of the class.

    Returns:
        The network with `jax.ShapeDtypeStruct` parameters.
    """
    cls = cls if isinstance(cls, str) else f"{cls.__module__}:{cls.__qualname__}"
    structure = Structure(cls, config, dtype, param_dtype or dtype, tuple(options.items()))
    return Network(structure, dict(structure.shapes))


class _NoKeys:
    """Stands for nnx.Rngs where only shapes are wanted: parameters are then zeros, see `models.layers.or_zeros`."""

    def params(self) -> None:
        return None


def abstract_params(config: AnyConfig) -> dict[str, Any]:
    """Every parameter of a checkpoint: "component.name" -> ShapeDtypeStruct.

    Beside those of the networks: the statistics by which unCLIP and its prior normalise image embeddings, and CLIP's
    similarity scale, the logarithm of a factor.
    """
    params: dict[str, Any] = {
        f"{component}.{name}": spec
        for component, network in abstract_networks(config).items()
        for name, spec in network.params.items()
    }
    width: int | None = None
    if isinstance(config, ClipConfig):
        params["similarity.logit_scale"] = jax.ShapeDtypeStruct((), jnp.float32)
    elif isinstance(config, PriorCheckpointConfig):
        width = config.prior.embedding_dim
    elif isinstance(config, CheckpointConfig):
        width = config.image_embedding_dim
    if width is not None:
        params |= {f"image_normalizer.{name}": jax.ShapeDtypeStruct((width,), jnp.float32) for name in ("mean", "std")}
    return params


def is_stacked(name: str) -> bool:
    """Whether a parameter of this name stacks a tower's layers along its first axis."""
    return ".layers." in name


def fill(network: Network, read: Callable[[str], np.ndarray], place: Place) -> Network:
    """Reads an abstract network's parameters one by one, casts them to its dtype and places them on their devices.

    Args:
        network: The abstract network.
        read: name -> array.
        place: (name, array) -> array on its device or in shards.

    Returns:
        The network with parameters.

    Raises:
        ValueError: An array has the wrong shape.
    """

    def filled(name: str, spec: Any) -> jax.Array:
        # A function of its own, so that one parameter is freed before the next is read: some take a gigabyte.
        array = read(name)
        if array.shape != spec.shape:
            raise ValueError(f"{name} has shape {array.shape}; want {spec.shape}")
        return place(name, array.astype(spec.dtype, copy=False))

    return Network(network.graphdef, {name: filled(name, spec) for name, spec in network.params.items()})
