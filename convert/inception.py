"""The published weights of FID's Inception: `pt_inception-2015-12-05-6726825d.pth`, or the same in safetensors."""

from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from convert.engine import Rule, Unused, check, import_params, require_complete
from convert.readers import open_tensors
from unclip_jax.checkpoints.networks import Network
from unclip_jax.models.inception import Inception

_PARTS = {"kernel": ("conv.weight", "conv"), "scale": ("bn.weight", "same"), "bias": ("bn.bias", "same")}
_PARTS |= {"mean": ("bn.running_mean", "same"), "variance": ("bn.running_var", "same")}
_UNUSED = [
    Unused(r"fc\.(weight|bias)", "classes are not wanted"),
    Unused(r"AuxLogits\..*", "only for training"),
    Unused(r".*\.num_batches_tracked", "a count"),
]


def abstract_inception() -> Network:
    """The network with shapes instead of parameters."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Inception(rngs=nnx.Rngs(0))))
    flat = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    return Network(graphdef, {name: jax.ShapeDtypeStruct(v.shape, v.dtype) for name, v in flat.items()})


def inception_rules(params: dict[str, jax.ShapeDtypeStruct]) -> list[Rule]:
    """Our names and theirs: they differ only in the parts of a layer."""
    rules = []
    for name in params:
        module, _, leaf = name.rpartition(".")
        foreign, layout = _PARTS[leaf]
        rules.append(Rule(f"{module}.{foreign}", name, layout))
    return rules


def open_inception(path: Path) -> Network:
    """Reads the weights.

    Args:
        path: The file.

    Returns:
        The network.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is broken, or of another network.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"inception: no such file: {path}")
    network = abstract_inception()
    rules = inception_rules(network.params)
    with open_tensors(path) as file:
        require_complete(check(rules, network.params, file.tensors, _UNUSED), str(path))
        params = import_params(rules, network.params, file.tensors, file.read)
        return Network(network.graphdef, {name: jnp.asarray(p.read(), jnp.float32) for name, p in params.items()})
