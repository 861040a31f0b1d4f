"""The random weights behind the recordings in tests/golden: each parameter is drawn from its own name.

So a model of any size needs no file but the list of its tensors, and any one tensor can be made alone.
"""

import ast
import functools
import gzip
import math
import zlib
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from convert import engine
from convert.architecture.presets import PRESETS
from convert.readers import TensorInfo
from convert.rules import ldm
from unclip_jax.checkpoints.networks import Network, abstract_networks, fill

GOLDEN = Path(__file__).parent / "golden"
SEED = 1234
# What a reader has to compute from the configuration is not in the files that the recordings were made from.
COMPUTED = ("betas", "cumprod", "cumprod_prev", "variance", "clipped", "coef1", "coef2")


def inventory(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint as a gzipped table lists them: name, shape, dtype and perhaps a remark."""
    tensors = {}
    for line in gzip.decompress(path.read_bytes()).decode().splitlines():
        name, shape, dtype, *remark = line.split("\t")
        if not name.startswith("#") and "NOT in ckpt" not in "".join(remark):
            tensors[name] = TensorInfo(ast.literal_eval(shape), np.dtype(dtype))
    return tensors


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 value of a parameter: seeded by its full name; matrices and kernels are scaled by their fan-in."""
    if not shape:
        return np.asarray(math.log(1 / 0.07), np.float32)  # CLIP's logit_scale
    generator = np.random.Generator(np.random.PCG64([SEED, zlib.crc32(name.encode())]))
    noise = generator.standard_normal(shape, dtype=np.float32)
    if len(shape) > 1:
        return noise / np.float32(math.sqrt(math.prod(shape[1:])))
    return np.float32(1) + np.float32(0.1) * noise if name.endswith(".weight") else np.float32(0.05) * noise


def write_model(name: str, path: Path) -> Path:
    """Writes the weights of a reduced model (tests/golden/models) as a `.safetensors` file in the original's layout."""
    tensors = inventory(GOLDEN / "models" / name / "keys.tsv.gz")
    arrays = {key: weight(key, info.shape) for key, info in tensors.items() if not _computed(key)}
    save_file({key: np.asarray(array) for key, array in arrays.items()}, path)
    return path


def full_size_network(component: str) -> Network:
    """One network of v2-1-stable-unclip-h in float32, converted by the ldm table from tensors made on demand."""
    config = PRESETS["sd21-unclip-h"]
    network = abstract_networks(config)[component]
    params = {f"{component}.{name}": spec for name, spec in network.params.items()}
    tensors = inventory(GOLDEN / "inventory" / "v2-1-stable-unclip-h.tsv.gz")
    # Query, key and value are three reads of one tensor in a row.
    read = functools.lru_cache(maxsize=2)(lambda name: weight(name, tensors[name].shape))
    imported = engine.import_params(ldm.table(config, params).rules, params, tensors, read)
    return fill(network, lambda name: imported[f"{component}.{name}"].read(), lambda name, array: jax.device_put(array))


def _computed(name: str) -> bool:
    module, _, last = name.rpartition(".")
    return module in ("", "noise_augmentor") and last.endswith(COMPUTED)
