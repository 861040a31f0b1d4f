"""Reads adapters that other tools wrote: LoRA of diffusers, peft, kohya and the original's names; learnt words.

Only with the readers of `convert.readers`: nothing that a file names is run. What a file holds must all be understood
and fit the checkpoint, or the file is refused in one line: an adapter read by halves would make other pictures.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.engine import LAYOUTS, Rule, core_shape, foreign_shape
from convert.readers import CheckpointError, TensorFile, TensorInfo, load_pickle, open_tensors, recognise
from convert.rules import lora as names
from convert.tensor_file import naming, parse_json, quoted
from unclip_jax.adapters.lora import LowRank
from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.checkpoints.finite import warn_unless_finite
from unclip_jax.checkpoints.hub import download_file
from unclip_jax.checkpoints.networks import abstract_params
from unclip_jax.checkpoints.places import place_of

LORA_FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
WORD_FILES = ("learned_embeds.safetensors", "learned_embeds.bin")
METADATA = "lora_adapter_metadata"
LONGEST_WORD, LONGEST_NAME = 200, 500

ROLES = {
    **dict.fromkeys((".lora_A", ".lora_A.default", ".lora_down", ".lora.down", ".lora_linear_layer.down"), "down"),
    **dict.fromkeys((".lora_B", ".lora_B.default", ".lora_up", ".lora.up", ".lora_linear_layer.up"), "up"),
    "_lora.down": "down",
    "_lora.up": "up",
}
# What a tensor's name shows to be of another kind of adapter: a pattern, and what to call it.
OTHER_KINDS = {
    r".*\.(dora_scale|lora_magnitude_vector.*)": "DoRA (magnitudes apart)",
    r".*\.hada_.*": "LoHa (Hadamard products)",
    r".*\.lokr_.*": "LoKr (Kronecker products)",
    r".*\.oft_.*": "OFT (orthogonal finetuning)",
    r".*\.lora_mid\..*": "a Tucker decomposition (lora_mid)",
    r".*\.(diff|diff_b|set_weight)": "whole differences of weights",
    r".*lora_(B|up).*\.bias": "LoRA with biases",
    r".*lora_embedding_.*": "LoRA of an embedding",
}
FAMILIES = {768: "Stable Diffusion 1", 2048: "Stable Diffusion XL"}


def read_lora(path: Path | str, config: CheckpointConfig, weight_name: str | None = None) -> dict[str, LowRank]:
    """A LoRA file as an adapter of a checkpoint's UNet and text encoder; arrays in the file's dtype, alpha float32.

    path: a `.safetensors` or torch file, or a folder or the hub id of a repository with diffusers'
    `pytorch_lora_weights`, or with a file called `weight_name`. Keys: our parameters' names, see
    `unclip_jax.adapters.lora.Lora`. A missing alpha is the rank. Adapters of the text encoder's last layer, which the
    checkpoint does not run, are left out.

    Raises FileNotFoundError, what `unclip_jax.checkpoints.hub.download` raises, and CheckpointError in one line for a
    file that is damaged, hostile, of another base model, or holds anything that is not understood.
    """
    path = _file(path, LORA_FILES, weight_name)
    with open_tensors(path) as file, naming(path):
        found = _modules(file.tensors)
        modules = names.read(config)
        params = abstract_params(config)
        known = {name: modules[name] for name in found if name in modules}
        ranks = _checked(found, known, file.tensors, params)
        if unknown := [key for name in found if name not in modules for key in found[name].values()]:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise CheckpointError(
                f"{quoted(min(unknown))}{more}: this checkpoint has no such module; an adapter of another base model?"
            )
        alphas = _peft_alphas(file, known, ranks)
        lora: dict[str, LowRank] = {}
        for name, rules in known.items():
            for ours, change in _changes(file, found[name], rules, ranks[name], alphas.get(name), params):
                if ours in lora:
                    raise CheckpointError(f"{quoted(name)}: the same module is there twice, under different names")
                lora[ours] = change
        if not lora:
            raise CheckpointError("holds no adapter (LoRA) of a layer that this checkpoint runs")
        return lora


def _file(source: Path | str, usual: tuple[str, ...], weight_name: str | None) -> Path:
    """The file itself, or the one that a folder or a repository has under the given or one of the usual names."""
    if place := place_of(str(source)):
        return download_file(place.repo_id, usual, weight_name, path=place.path, revision=place.revision)
    path = Path(source)
    if not path.is_dir():
        if weight_name is not None:
            raise ValueError(f"weight_name is {weight_name!r}, but {path} is no folder")
        return path
    wanted = usual if weight_name is None else (weight_name,)
    found = next((path / name for name in wanted if (path / name).exists()), None)
    if found is None:
        raise FileNotFoundError(f"{path}: holds none of {', '.join(wanted)}; name the file itself")
    return found


def _modules(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, str]]:
    """A file's tensors by module and role ("down", "up", "alpha")."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    strange = []
    for key in tensors:
        if len(key) > LONGEST_NAME:
            raise CheckpointError(f"{quoted(key)}: {len(key)} characters; no tensor of a LoRA file has such a name")
        for pattern, kind in OTHER_KINDS.items():
            if re.fullmatch(pattern, key, re.DOTALL):
                raise CheckpointError(f"{quoted(key)}: is {kind}, which is not supported; want LoRA's two factors")
        split = _split(key)
        if split is None:
            strange.append(key)
            continue
        module, role = split
        if role in found[module]:
            raise CheckpointError(f"{quoted(key)}: the same module is there twice, under different names")
        found[module][role] = key
    if strange:
        raise CheckpointError(f"{quoted(strange[0])}: not a name of a LoRA file's tensors ({len(strange)} are not)")
    for module, roles in found.items():
        if missing := {"down", "up"} - roles.keys():
            raise CheckpointError(f"{quoted(module)}: its {min(missing)} factor is missing")
    return dict(found)


def _split(key: str) -> tuple[str, str] | None:
    """The canonical name of a tensor's module, and its role in it."""
    if key.endswith(".alpha"):
        return names.canonical(key.removesuffix(".alpha").removesuffix("_lora")), "alpha"
    if key.endswith(".weight"):
        stem = key.removesuffix(".weight")
        for end, role in ROLES.items():
            if stem.endswith(end):
                return names.canonical(stem.removesuffix(end)), role
    return None


def _checked(
    found: Mapping[str, Mapping[str, str]],
    known: names.Modules,
    tensors: Mapping[str, TensorInfo],
    params: Mapping[str, Any],
) -> dict[str, int]:
    """The ranks of the modules, whose tensors fit their kernels; what names another base model best comes first."""
    ranks, wrong = {}, []
    for name, rules in known.items():
        down, up = (tensors[found[name][role]] for role in ("down", "up"))
        rank = ranks[name] = down.shape[0] if down.shape else 0
        for role, info in (("down", down), ("up", up), ("alpha", tensors.get(found[name].get("alpha", "")))):
            # bfloat16 is of numpy's kind V; alpha may be a whole number.
            if info is not None and info.dtype.kind not in ("fViu" if role == "alpha" else "fV"):
                raise CheckpointError(f"{quoted(found[name][role])} has dtype {info.dtype}, want a floating one")
            if info is not None and role == "alpha" and math.prod(info.shape) != 1:
                raise CheckpointError(f"{quoted(found[name][role])} has shape {info.shape}; want one number")
        if not rank:
            raise CheckpointError(f"{quoted(found[name]['down'])} has shape {down.shape}: a rank of 0")
        if rules:
            out, *inner = foreign_shape(rules[0], params)
            for role, info, want in (("down", down, (rank, *inner)), ("up", up, (out, rank))):
                if core_shape(info.shape) != core_shape(want):
                    width = info.shape[1] if role == "down" and len(info.shape) > 1 else 0
                    telling = bool(re.search(r"\.attn2\.to_[kv]\.|\.[qkv]_proj\.", rules[0].ours))
                    family = f", as {FAMILIES[width]} has it" if telling and width in FAMILIES else ""
                    text = f"{quoted(found[name][role])} has shape {info.shape}, want {want}: of another base model"
                    wrong.append((not family, not telling, text + family))
    if wrong:
        raise CheckpointError(min(wrong)[2])
    return ranks


def _changes(
    file: TensorFile,
    keys: Mapping[str, str],
    rules: tuple[Rule, ...],
    rank: int,
    alpha: float | None,
    params: Mapping[str, Any],
) -> list[tuple[str, LowRank]]:
    """A module's factors in our layout, by our name; of a fused one, a part of `up` for each kernel."""
    if "alpha" in keys:
        alpha = float(file.read(keys["alpha"]).reshape(()))
    number = np.asarray(rank if alpha is None else alpha, np.float32)
    if not np.isfinite(number):
        raise CheckpointError(f"{quoted(keys.get('alpha', METADATA))}: alpha is {alpha}; want a finite number")
    if not rules:
        return []
    out, *inner = foreign_shape(rules[0], params)  # of all of them the same
    down = warn_unless_finite(keys["down"], file.read(keys["down"])).reshape(rank, *inner)
    up = warn_unless_finite(keys["up"], file.read(keys["up"])).reshape(out, rank)
    down = np.array(LAYOUTS[rules[0].layout].ours(down), order="C")  # copies: the file may be written over
    parts = np.split(up, rules[0].parts)
    return [(parameter(rule), LowRank(down, np.array(parts[rule.part].T, order="C"), number)) for rule in rules]


def parameter(rule: Rule) -> str:
    """Our name, in an adapter, of the kernel that a rule fills: the number of a stacked layer within."""
    return rule.ours if rule.layer is None else rule.ours.replace(".layers.", f".layers.{rule.layer}.")


def _peft_alphas(file: TensorFile, known: names.Modules, ranks: Mapping[str, int]) -> dict[str, float]:
    """The alphas of modules by the settings that diffusers writes into a file's metadata: peft's of each network."""
    if METADATA not in file.metadata:
        return {}
    settings = parse_json(file.metadata[METADATA].encode())
    if not isinstance(settings, dict):
        raise CheckpointError(f"{METADATA}: want a JSON object")
    alphas = {}
    for network in ("unet", "text_encoder"):
        own = {key.removeprefix(f"{network}."): v for key, v in settings.items() if key.startswith(f"{network}.")}
        if not own:
            continue
        if own.get("use_dora"):
            raise CheckpointError(f"{METADATA}: {network}.use_dora is set, and DoRA is not supported")
        patterns = _numbers(own.get("alpha_pattern") or {}, f"{network}.alpha_pattern")
        default = _numbers({"lora_alpha": own.get("lora_alpha", 8)}, network)["lora_alpha"]  # 8 is peft's own
        order = {pattern: index for index, pattern in enumerate(patterns)}
        for name in known:
            if name.startswith(f"{network}."):
                words = name.split(".")[1:]
                ends = [".".join(words[start:]) for start in range(len(words))]
                fitting = [end for end in (f"^{ends[0]}", *ends) if end in patterns]
                alpha = patterns[min(fitting, key=order.__getitem__)] if fitting else default
                alphas[name] = alpha * math.sqrt(ranks[name]) if own.get("use_rslora") else alpha
    return alphas


def _numbers(values: Any, where: str) -> dict[str, float]:
    """Numbers by module. peft takes the names for regular expressions, but writes the modules' own, or their ends."""
    if not isinstance(values, dict):
        raise CheckpointError(f"{METADATA}: {where}: want an object of numbers")
    for name, value in values.items():
        if not re.fullmatch(r"\^?[\w.]+", name):
            raise CheckpointError(f"{METADATA}: {where}: {quoted(name)}; accepted: names of modules")
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e9:
            raise CheckpointError(f"{METADATA}: {where}: {quoted(name)} is {quoted(json.dumps(value))}; want a number")
    return {name: float(value) for name, value in values.items()}


def read_textual_inversion(
    path: Path | str, config: CheckpointConfig, token: str | None = None, weight_name: str | None = None
) -> dict[str, np.ndarray]:
    """A learnt word in a file of diffusers (`learned_embeds`) or AUTOMATIC1111: {word: rows (n, width)}.

    path: a `.safetensors` or torch file, or a folder or the hub id of a repository with diffusers' file, or with one
    called `weight_name`. token: what to call the word; None for the file's own name of it, and the file's stem where it
    has none (`emb_params`, a bare tensor).

    Raises FileNotFoundError, what `unclip_jax.checkpoints.hub.download` raises, and CheckpointError in one line for a
    file that is damaged, hostile, or of another base model, whose text encoder is of another width.
    """
    path = _file(path, WORD_FILES, weight_name)
    with naming(path):
        name, rows = _word(path)
        word = token if token is not None else path.stem if name is None else name
        if not isinstance(word, str) or not word or len(word) > LONGEST_WORD or re.search(r"\s", word):
            shown = quoted(word) if isinstance(word, str) else f"a {type(word).__name__}"
            raise CheckpointError(f"its word is {shown}; want one without white space: give another as token")
        width = config.text_encoder.width
        if rows.dtype.kind not in "fV":
            raise CheckpointError(f"{quoted(word)} has dtype {rows.dtype}, want a floating one")
        if rows.ndim not in (1, 2) or not rows.size or rows.shape[-1] != width:
            family = f", as {FAMILIES[rows.shape[-1]]} has it" if rows.shape[-1:] in ((n,) for n in FAMILIES) else ""
            raise CheckpointError(
                f"{quoted(word)} has shape {rows.shape}, want (vectors, {width}): of another base model{family}"
            )
        return {word: warn_unless_finite(word, np.ascontiguousarray(rows).reshape(-1, width))}


def _word(path: Path) -> tuple[Any, np.ndarray]:
    """The word that a file names, None where it names none, and its vectors as they are."""
    if recognise(path) == "safetensors":
        with open_tensors(path) as file:
            content: Any = {key: file.read(key) for key in file.tensors}
    else:
        content = load_pickle(path)
    if isinstance(content, np.ndarray):
        return None, content
    if isinstance(content, dict) and isinstance(content.get("string_to_param"), dict):
        name, vectors = content.get("name"), content["string_to_param"].get("*")
    elif isinstance(content, dict) and len(content) == 1:
        name, vectors = next(iter(content.items()))
        name = None if name == "emb_params" else name
    elif isinstance(content, dict) and {"clip_l", "clip_g"} & content.keys():
        raise CheckpointError("is a word for two text encoders (clip_l, clip_g): of another base model")
    else:
        raise CheckpointError("is no learnt word: want one tensor by its word, or AUTOMATIC1111's string_to_param")
    if not isinstance(vectors, np.ndarray):
        raise CheckpointError("is no learnt word: in the place of its vectors is something else than a tensor")
    return name, vectors
