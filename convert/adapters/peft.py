"""peft's settings of an adapter, from `adapter_config.json` or from a file's metadata, where diffusers writes them."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.adapters.sources import PEFT_SETTINGS
from convert.rules.lora import WRAPPERS
from convert.tensor_file import CheckpointError, TensorFile, naming, open_file, parse_json, quoted
from unclip_jax.checkpoints.strict_json import LIMIT

METADATA = "lora_adapter_metadata"
KINDS = ("LORA", "LOHA", "LOKR", "IA3")
# Ways to start the factors that leave the base's weights as they are; after others the file fits no published base.
STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "lycoris")
# Settings that change what the factors mean.
UNSUPPORTED = ("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config",
               "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of one network's adapter.

    Attributes:
        where: The prefix of a setting's name in messages.
        rank: The rank.
        alpha: The alpha.
        ranks: By modules' names or their ends, where they differ.
        alphas: Likewise.
        rslora: Whether the scale is alpha / sqrt(rank).
        dora: Whether it is a DoRA.
        feedforward: Names of modules whose inputs (IA)^3 changes.
        whole: Whether weights and biases that are stored whole replace the base's.
    """

    where: str
    rank: float
    alpha: float
    ranks: Mapping[str, float]
    alphas: Mapping[str, float]
    rslora: bool
    dora: bool
    feedforward: tuple[str, ...]
    whole: bool

    def alpha_of(self, name: str, rank: float) -> float:
        """The alpha of a module, by its name in the file, for which the factors' scale is alpha / rank."""
        alpha = _fitting(self.alphas, name, self.alpha)
        return alpha * math.sqrt(rank) if self.rslora else alpha

    def rank_of(self, name: str) -> float:
        return _fitting(self.ranks, name, self.rank)

    def on_input(self, name: str) -> bool:
        """Whether (IA)^3's factors change a module's inputs."""
        return bool(set(_ends(name)) & set(self.feedforward))


def metadata_settings(file: TensorFile) -> dict[str, Settings]:
    """peft's settings by network in a file's metadata, if diffusers has written them.

    Raises:
        CheckpointError: They are damaged or not supported.
    """
    if METADATA not in file.metadata:
        return {}
    metadata = parse_json(file.metadata[METADATA].encode())
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{METADATA}: want a JSON object")
    found = {}
    for network in ("unet", "text_encoder"):
        own = {k.removeprefix(f"{network}."): v for k, v in metadata.items() if k.startswith(f"{network}.")}
        if own:
            found[network] = _settings(own, f"{METADATA}: {network}.")
    return found


def folder_settings(path: Path) -> Settings:
    """peft's settings in the file beside its weights.

    Raises:
        FileNotFoundError: There are none.
        CheckpointError: They are damaged or not supported.
    """
    config = path.with_name(PEFT_SETTINGS)
    if not config.exists():
        raise FileNotFoundError(f"{path}: peft keeps alpha in {PEFT_SETTINGS} beside this file, which is missing")
    with naming(path.parent):
        with open_file(config) as opened:
            data = parse_json(opened.read(LIMIT + 1))
        if not isinstance(data, dict):
            raise CheckpointError(f"{PEFT_SETTINGS}: want a JSON object")
        kind = data.get("peft_type")
        if kind not in KINDS:
            shown = quoted(kind) if isinstance(kind, str) else f"of type {type(kind).__name__}"
            raise CheckpointError(f"{PEFT_SETTINGS}: peft_type is {shown}; read are {', '.join(KINDS)}")
        return _settings(data, f"{PEFT_SETTINGS}: ")


def _settings(data: Mapping[str, Any], where: str) -> Settings:
    for name in UNSUPPORTED:
        if data.get(name):
            raise CheckpointError(f"{where}{name} is set, which is not supported")
    for name in ("init_lora_weights", "init_weights"):
        if (start := data.get(name)) not in STARTS:
            text = quoted(start) if isinstance(start, str) else f"a {type(start).__name__}"
            raise CheckpointError(
                f"{where}{name} is {text}, which changes the base's weights; convert the adapter to plain LoRA in peft"
            )
    feedforward = data.get("feedforward_modules") or []
    if not isinstance(feedforward, list) or not all(isinstance(name, str) for name in feedforward):
        raise CheckpointError(f"{where}feedforward_modules: accepted: a list of modules' names")
    alpha = data.get("lora_alpha", data.get("alpha", 8))  # 8 is peft's own
    numbers = _numbers({"r": data.get("r", 8), "lora_alpha": alpha}, where.rstrip(": ."))
    return Settings(
        where,
        numbers["r"],
        numbers["lora_alpha"],
        _numbers(data.get("rank_pattern") or {}, f"{where}rank_pattern"),
        _numbers(data.get("alpha_pattern") or {}, f"{where}alpha_pattern"),
        bool(data.get("use_rslora")),
        bool(data.get("use_dora")),
        tuple(feedforward),
        bool(data.get("modules_to_save")) or data.get("bias", "none") != "none",
    )


def _numbers(values: Any, where: str) -> dict[str, float]:
    """Numbers by module. peft reads the names as regular expressions, but writes the modules' own, or their ends."""
    if not isinstance(values, dict):
        raise CheckpointError(f"{where}: want an object of numbers")
    for name, value in values.items():
        if not re.fullmatch(r"\^?[\w.]+", name):
            raise CheckpointError(f"{where}: {quoted(name)}; accepted: names of modules")
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e9:
            raise CheckpointError(f"{where}: {quoted(name)} is {quoted(json.dumps(value))}; want a number")
    return {name: float(value) for name, value in values.items()}


def _fitting(patterns: Mapping[str, float], name: str, default: float) -> float:
    """The number of the first pattern that is a module's name or its end."""
    ends = _ends(name)
    fitting = {f"^{ends[0]}", *ends} & patterns.keys()
    return next((value for pattern, value in patterns.items() if pattern in fitting), default)


def _ends(name: str) -> list[str]:
    """A module's name within its network, and all its ends."""
    words = re.sub(r"^(unet|text_encoder)\.", "", WRAPPERS.sub("", name).removeprefix(".")).split(".")
    return [".".join(words[start:]) for start in range(len(words))]
