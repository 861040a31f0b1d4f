"""cloneofsimo's files: pairs of factors, numbered in the order of the modules of an old diffusers.

`.safetensors` files name them "unet:0:up", with the adapted classes in the metadata; torch files are plain lists of up,
down, up, down … for one network. The order and the classes are inferred from the shapes.
"""

import contextlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from convert.adapters.roles import Found
from convert.adapters.sources import as_array
from convert.engine import Shape, core_shape, foreign_shape
from convert.rules.lora import Module, Network
from convert.tensor_file import CheckpointError, TensorFile, TensorInfo, quoted

NUMBERED = re.compile(r"(\w+):(\d{1,6}):(up|down)")
NETWORKS: dict[str, Network] = {
    "unet": "unet",
    "lora_unet": "unet",
    "text_encoder": "text_encoder",
    "lora_te": "text_encoder",
}
UNNAMED = "list"  # the network of a torch file, which does not say which it is
ATTENTION = ("to_q", "to_k", "to_v", "to_out_0")
RESNET = ("conv1", "time_emb_proj", "conv2", "conv_shortcut")
TEXT = ("k_proj", "v_proj", "q_proj", "out_proj")  # as transformers' CLIPAttention makes them
# The sets of classes that its trainers adapt in a UNet: up to January 2023, since then, and with convolutions.
CLASSES: tuple[frozenset[str], ...] = (
    frozenset({"CrossAttention", "Attention"}),
    frozenset({"CrossAttention", "Attention", "GEGLU"}),
    frozenset({"CrossAttention", "Attention", "GEGLU", "ResnetBlock2D"}),
)


def from_list(content: Sequence[Any]) -> TensorFile:
    """A torch file's list of tensors, under the names that they have in the other form.

    Raises:
        CheckpointError: It is not a list of pairs.
    """
    if not content or len(content) % 2:
        raise CheckpointError(f"is a list of {len(content)}; want pairs of LoRA's factors")
    arrays = {
        f"{UNNAMED}:{index // 2}:{('up', 'down')[index % 2]}": as_array(f"entry {index}", value)
        for index, value in enumerate(content)
    }
    tensors = {name: TensorInfo(array.shape, array.dtype) for name, array in arrays.items()}
    return TensorFile(tensors, arrays.__getitem__, contextlib.ExitStack())


def numbered_modules(file: TensorFile, modules: Mapping[str, Module], params: Mapping[str, Any]) -> dict[str, Found]:
    """The modules of a file's numbered tensors, by canonical names.

    Raises:
        CheckpointError: No order fits.
    """
    groups: dict[str, dict[int, dict[str, str]]] = {}
    for key in file.tensors:
        if match := NUMBERED.fullmatch(key):
            groups.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = key
    found = {}
    for group, pairs in groups.items():
        if group not in NETWORKS and group != UNNAMED:
            raise CheckpointError(f"{quoted(group)}: no network of this checkpoint; known: {', '.join(NETWORKS)}")
        for index in range(len(pairs)):
            if missing := {"up", "down"} - pairs.get(index, {}).keys():
                raise CheckpointError(f"{quoted(f'{group}:{index}')}: its {min(missing)} factor is missing")
        networks = [NETWORKS[group]] if group in NETWORKS else list(dict.fromkeys(NETWORKS.values()))
        classes = _classes(file.metadata[group]) if group in file.metadata else None
        orders = [order for network in networks for order in _orders(modules, network, classes)]
        wanted = [_shapes(file, pairs[index]) for index in range(len(pairs))]
        fitting = [order for order in orders if [_core(modules, name, params) for name in order] == wanted]
        if not fitting:
            counts = ", ".join(dict.fromkeys(str(len(order)) for order in orders))
            raise CheckpointError(
                f"{quoted(group)}: {len(pairs)} pairs of factors, which do not fit this checkpoint's modules in order "
                f"({counts} of them): of another base model?"
            )
        for index, name in enumerate(fitting[0]):
            found[name] = Found(f"{group}:{index}", pairs[index])
    return found


def _classes(text: str) -> frozenset[str]:
    try:
        names = json.loads(text)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"its metadata says {quoted(text)}; want the names of the classes that are adapted")
    return frozenset(names)


def _orders(modules: Mapping[str, Module], network: Network, classes: frozenset[str] | None) -> Iterator[list[str]]:
    """The canonical names of the modules that may have been adapted, in the orders of old releases."""
    if network == "text_encoder":
        layers = itertools.takewhile(
            lambda layer: f"{network}.encoder_layers_{layer}_mlp_fc1" in modules, itertools.count()
        )
        run = [f"encoder_layers_{layer}" for layer in layers]
        # All layers, or all but the last, which is not run and not always there.
        for towers in (run, run[:-1]):
            yield [f"{network}.{layer}_self_attn_{part}" for layer in towers for part in TEXT]
        return
    known = {name.removeprefix(f"{network}.") for name in modules if name.startswith(f"{network}.")}
    levels = sorted({int(match[1]) for name in known if (match := re.match(r"down_blocks_(\d+)_", name))})
    blocks = [*(f"down_blocks_{i}" for i in levels), *(f"up_blocks_{i}" for i in levels), "mid_block"]
    for adapted in CLASSES if classes is None else (classes,):
        for feed_forward in (1, 2):  # between the two attentions, or behind them
            order: list[str] = []
            for block in blocks:
                for index in range(_count(known, f"{block}_attentions")):
                    inner = f"{block}_attentions_{index}_transformer_blocks_0"
                    parts = [[f"{inner}_attn{i}_{part}" for part in ATTENTION] for i in (1, 2)]
                    if not adapted & {"CrossAttention", "Attention"}:
                        parts = [[], []]
                    parts.insert(feed_forward, [f"{inner}_ff_net_0_proj"] if "GEGLU" in adapted else [])
                    order += itertools.chain(*parts)
                if "ResnetBlock2D" in adapted:
                    for index in range(_count(known, f"{block}_resnets")):
                        order += [f"{block}_resnets_{index}_{part}" for part in RESNET]
            yield [f"{network}.{name}" for name in order if name in known]


def _count(known: set[str], prefix: str) -> int:
    numbers = {int(match[1]) for name in known if (match := re.match(rf"{prefix}_(\d+)_", name))}
    return len(numbers)


def _shapes(file: TensorFile, pair: Mapping[str, str]) -> tuple[Shape, int, int]:
    """What a pair shows about its module: the inputs' shape, the outputs, and that both ranks are equal."""
    down, up = (file.tensors[pair[role]].shape for role in ("down", "up"))
    if len(down) not in (2, 4) or len(up) not in (2, 4):
        raise CheckpointError(
            f"{quoted(pair['down'])} has shape {down}, {quoted(pair['up'])} {up}; want LoRA's factors"
        )
    return core_shape(down)[1:], up[0], up[1] - down[0]


def _core(modules: Mapping[str, Module], name: str, params: Mapping[str, Any]) -> tuple[Shape, int, int]:
    # The last text layer, which is not run, is like the first.
    rules = modules[name].weight or modules[re.sub(r"_layers_\d+_", "_layers_0_", name)].weight
    out, *inner = foreign_shape(rules[0], params)
    return core_shape((1, *inner))[1:], out, 0
