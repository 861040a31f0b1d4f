"""Converts the tensors of a module to changes of our parameters: shapes checked, axes moved, fused kernels split."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.adapters.peft import Settings
from convert.adapters.roles import Found
from convert.engine import LAYOUTS, Rule, Shape, core_shape, foreign_shape
from convert.readers import CheckpointError, TensorFile
from convert.rules.lora import Module
from convert.tensor_file import quoted
from unclip_jax.adapters.changes import (
    Change,
    Decomposed,
    Difference,
    Factor,
    Hadamard,
    Kronecker,
    LowRank,
    Replacement,
)
from unclip_jax.checkpoints.nonfinite import warn_unless_finite

FAMILIES = {768: "Stable Diffusion 1", 2048: "Stable Diffusion XL"}


class MisfitError(CheckpointError):
    """A tensor has a shape of another base model; `rank` selects the most informative of many such errors."""

    def __init__(self, text: str, rank: tuple[bool, ...]):
        super().__init__(text)
        self.rank = rank


def parameter(rule: Rule) -> str:
    """Our name, in an adapter, of the parameter that a rule fills, including the number of a stacked layer."""
    return rule.ours if rule.layer is None else rule.ours.replace(".layers.", f".layers.{rule.layer}.")


@dataclasses.dataclass(frozen=True)
class Tensors:
    """A module's tensors, read by their roles. params: a checkpoint's, name -> shape."""

    file: TensorFile
    found: Found
    module: Module
    params: Mapping[str, Any]
    settings: Settings | None

    def __contains__(self, role: str) -> bool:
        return role in self.found.keys

    def key(self, role: str) -> str:
        return quoted(self.found.keys[role])

    def shape(self, role: str) -> Shape:
        return self.file.tensors[self.found.keys[role]].shape

    def size(self, role: str, axis: int) -> int:
        """The length of an axis that only the tensor determines: a rank, or a factor of a product."""
        shape = self.shape(role)
        size = shape[axis] if len(shape) > axis else 0
        if not size:
            raise CheckpointError(f"{self.key(role)} has shape {shape}: a rank of 0")
        return size

    def read(self, role: str, want: Shape) -> np.ndarray:
        """A tensor in the shape that it must have, except for differences between dialects."""
        key, info = self.found.keys[role], self.file.tensors[self.found.keys[role]]
        if info.dtype.kind not in "fV":  # bfloat16 is of numpy's kind V
            raise CheckpointError(f"{self.key(role)} has dtype {info.dtype}, want a floating one")
        if core_shape(info.shape) != core_shape(want):
            width = info.shape[1] if role in ("down", "hada_w1_b") and len(info.shape) > 1 else 0
            name = self.module.weight[0].ours if self.module.weight else ""
            telling = bool(re.search(r"\.attn2\.to_[kv]\.|\.[qkv]_proj\.", name))
            family = f", as {FAMILIES[width]} has it" if telling and width in FAMILIES else ""
            text = f"{self.key(role)} has shape {info.shape}, want {want}: of another base model{family}"
            raise MisfitError(text, (not family, not telling))
        return warn_unless_finite(key, self.file.read(key)).reshape(want)

    def number(self, role: str) -> float:
        info = self.file.tensors[self.found.keys[role]]
        if info.dtype.kind not in "fViub":
            raise CheckpointError(f"{self.key(role)} has dtype {info.dtype}, want a number")
        if math.prod(info.shape) != 1:
            raise CheckpointError(f"{self.key(role)} has shape {info.shape}; want one number")
        value = float(self.file.read(self.found.keys[role]).reshape(()))
        if not math.isfinite(value):
            raise CheckpointError(f"{self.key(role)}: {role} is {value}; want a finite number")
        return value

    def alpha(self, rank: float) -> float:
        """The alpha, with the scale being alpha / rank: the file's, peft's, or the rank; times a learnt scalar."""
        if "alpha" in self:
            alpha = self.number("alpha")
        else:
            alpha = rank if self.settings is None else self.settings.alpha_of(self.found.name, rank)
        return alpha * self.number("scalar") if "scalar" in self else alpha


def changes(tensors: Tensors) -> list[tuple[str, Change]]:
    """A module's changes by our parameters' names; for a fused module, a change for each of its parts.

    Raises:
        CheckpointError: The tensors are not understood.
        MisfitError: The shapes belong to another model.
    """
    kind, module = tensors.found.kind(), tensors.module
    found: list[tuple[str, Change]] = []
    if not module.weight and not module.bias:
        return found  # nothing that is run reads it
    if kind is not None:
        if not module.weight:
            raise CheckpointError(f"{quoted(tensors.found.name)}: this layer has no weight")
        shape = foreign_shape(module.weight[0], tensors.params)  # of all of them the same
        found += zip(map(parameter, module.weight), _weight(kind, tensors, shape), strict=True)
    for role in ("up_bias", "diff_b", "bias"):
        if role in tensors:
            found += _bias(role, tensors)
    if kind == "peft's (IA)^3" and module.bias and isinstance(found[0][1], Factor) and found[0][1].value.ndim == 1:
        # peft multiplies the outputs, and with them the bias.
        found += [(parameter(rule), change) for rule, (_, change) in zip(module.bias, found, strict=True)]
    return found


def _weight(kind: str, t: Tensors, shape: Shape) -> list[Change]:
    rules = t.module.weight
    if kind in ("LoRA", "LoHa", "LoKr", "(IA)^3", "peft's (IA)^3") and not rules[0].ours.endswith(".kernel"):
        raise CheckpointError(f"{quoted(t.found.name)}: {kind} of a layer that has no kernel")
    match kind:
        case "LoRA":
            return _decomposed(t, _lora(t, shape))
        case "LoRA of an embedding":
            rank = t.size("embedding_down", 0)
            down, up = t.read("embedding_down", (rank, shape[0])), t.read("embedding_up", (shape[1], rank))
            return [LowRank(_owned(down.T), _owned(up.T), np.float32(t.alpha(rank)))]
        case "LoHa":
            return _decomposed(t, _loha(t, shape))
        case "LoKr":
            return _decomposed(t, _lokr(t, shape))
        case "(IA)^3":
            return _factors(t, "weight", shape, on_input=bool(t.number("on_input")), unchanged=0)
        case "peft's (IA)^3":
            return _factors(t, "ia3_l", shape, on_input=_is_on_input(t, shape), unchanged=1)
        case "a difference" | "a norm":
            role = "diff" if kind == "a difference" else "w_norm"
            return [Difference(value, np.float32(1)) for value in _parts(rules, t.read(role, shape))]
        case _:
            return [Replacement(value) for value in _parts(rules, t.read(_whole(t, kind), shape))]


def _whole(t: Tensors, kind: str) -> str:
    """The role of a whole weight, if something says that it replaces the base's."""
    if kind == "a replacement":
        return "set_weight"
    _check_whole(t, "weight")
    return "weight"


def _check_whole(t: Tensors, role: str) -> None:
    if t.settings is None or not t.settings.whole:
        raise CheckpointError(f"{t.key(role)}: a whole {role}, and not a name of a LoRA file's tensors")


def _bias(role: str, t: Tensors) -> list[tuple[str, Change]]:
    rules = t.module.bias
    if not rules:
        raise CheckpointError(f"{t.key(role)}: a bias, and this layer has none")
    shape = foreign_shape(rules[0], t.params)
    scale = 1.0
    if role == "up_bias":
        rank = t.size("down", 0)
        scale = t.alpha(rank) / rank
    if role == "bias":
        _check_whole(t, role)
    values = _parts(rules, t.read(role, shape))
    changes = [Replacement(v) if role == "bias" else Difference(v, np.float32(scale)) for v in values]
    return [(parameter(rule), change) for rule, change in zip(rules, changes, strict=True)]


def _lora(t: Tensors, shape: Shape) -> list[Change]:
    out, *inner = shape
    rank = t.size("down", 0)
    if "mid" in t:
        down = _tucker(t.read("mid", (rank, rank, *inner[1:])), t.read("down", (rank, inner[0])))
    else:
        down = t.read("down", (rank, *inner))
    return [*_low_rank(t, down, t.read("up", (out, rank)), t.alpha(rank))]


def _loha(t: Tensors, shape: Shape) -> list[Change]:
    first, second = _hadamard_factor(t, 1, shape, None), _hadamard_factor(t, 2, shape, 1.0)
    return [Hadamard(*both) for both in zip(first, second, strict=True)]


def _hadamard_factor(t: Tensors, number: int, shape: Shape, scale: float | None) -> list[LowRank]:
    """One of LoHa's two changes; scale: instead of alpha / rank."""
    out, *inner = shape
    up, down, core = f"hada_w{number}_a", f"hada_w{number}_b", f"hada_t{number}"
    rank = t.size(down, 0)
    alpha = t.alpha(rank) if scale is None else scale * rank
    if core in t:
        whole = _tucker(t.read(core, (rank, rank, *inner[1:])), t.read(down, (rank, inner[0])))
        return _low_rank(t, whole, t.read(up, (rank, out)).T, alpha)
    return _low_rank(t, t.read(down, (rank, math.prod(inner))).reshape(rank, *inner), t.read(up, (out, rank)), alpha)


def _lokr(t: Tensors, shape: Shape) -> list[Change]:
    out, inner, *space = shape
    left_ends = ("lokr_w1", "lokr_w1") if "lokr_w1" in t else ("lokr_w1_a", "lokr_w1_b")
    if missing := [role for role in left_ends if role not in t]:
        raise CheckpointError(f"{quoted(t.found.name)}: its {missing[0]} factor is missing")
    a, b = t.size(left_ends[0], 0), t.size(left_ends[1], 1)
    if out % a or inner % b:
        text = f"{t.key(left_ends[0])} has shape {t.shape(left_ends[0])}, and {(out, inner)} is no multiple of {(a, b)}"
        raise MisfitError(f"{text}: of another base model", (True, True))
    rank: float | None = None
    if "lokr_w1" in t:
        left = _float32(t.read("lokr_w1", (a, b)))
    else:
        rank = t.size("lokr_w1_b", 0)
        left = _float32(t.read("lokr_w1_a", (a, rank))) @ _float32(t.read("lokr_w1_b", (rank, b)))
    want = (out // a, inner // b, *space)
    if "lokr_w2" in t:
        right = _float32(t.read("lokr_w2", want))
    else:
        if missing := [role for role in ("lokr_w2_a", "lokr_w2_b") if role not in t]:
            raise CheckpointError(f"{quoted(t.found.name)}: its {missing[0]} factor is missing")
        rank = t.size("lokr_w2_b", 0)
        if "lokr_t2" in t:
            down = _tucker(t.read("lokr_t2", (rank, rank, *space)), t.read("lokr_w2_b", (rank, want[1])))
            up = t.read("lokr_w2_a", (rank, want[0])).T
        else:
            down, up = t.read("lokr_w2_b", (rank, math.prod(want[1:]))), t.read("lokr_w2_a", (want[0], rank))
        right = (_float32(up) @ _float32(down).reshape(rank, -1)).reshape(want)
    if rank is None and t.settings is not None:
        rank = t.settings.rank_of(t.found.name)
    # Of two whole factors LyCORIS takes no scale, whatever alpha it wrote.
    scale = np.float32((t.number("scalar") if "scalar" in t else 1.0) if rank is None else t.alpha(rank) / rank)
    rules = t.module.weight
    if rules[0].parts > 1:
        # The parts of a fused kernel are no products: only the whole is.
        whole = np.einsum("ab,cd...->acbd...", left, right).reshape(shape)
        return [Difference(part, scale) for part in _parts(rules, whole)]
    return [Kronecker(_owned(left.T), _owned(LAYOUTS[rules[0].layout].ours(right)), scale)]


def _decomposed(t: Tensors, inner: list[Change]) -> list[Change]:
    """DoRA: the changes, rescaled to the lengths in the file; LyCORIS' may be per input."""
    rules = t.module.weight
    out, ins, *_ = foreign_shape(rules[0], t.params)
    role = "magnitude" if "magnitude" in t else "dora_scale"
    if role not in t:
        if t.settings is not None and t.settings.dora:
            raise CheckpointError(f"{t.settings.where}use_dora is set, but {quoted(t.found.name)} has no magnitude")
        return inner
    # peft's are of the outputs always; LyCORIS' have them along the axis that the weight has them along.
    if role == "magnitude" or t.shape(role)[:1] == (out,):
        return [Decomposed(c, v) for c, v in zip(inner, _vectors(rules, _vector(t, role, out)), strict=True)]
    if rules[0].parts > 1:
        raise CheckpointError(f"{t.key(role)}: DoRA by inputs of a fused layer, which is not supported")
    magnitude = _vector(t, role, ins)[:, None]
    return [Decomposed(change, magnitude) for change in inner]


def _factors(t: Tensors, role: str, shape: Shape, *, on_input: bool, unchanged: float) -> list[Change]:
    rules = t.module.weight
    vector = _float32(_vector(t, role, shape[1] if on_input else shape[0])) - np.float32(unchanged)
    if on_input:
        return [Factor(vector[:, None]) for _ in rules]
    return [Factor(value) for value in _vectors(rules, vector)]


def _is_on_input(t: Tensors, shape: Shape) -> bool:
    """Whether peft's factors are per input, which it calls feed-forward."""
    (out, ins, *space), have = shape, t.shape("ia3_l")
    if not space and have in ((out, 1), (1, ins)):
        return have == (1, ins)
    if out == ins and t.settings is None:
        raise CheckpointError(
            f"{t.key('ia3_l')} has shape {have}: of the inputs or of the outputs? Its settings say so"
        )
    return t.settings.on_input(t.found.name) if t.settings is not None else math.prod(have) == ins


def _vector(t: Tensors, role: str, size: int) -> np.ndarray:
    """A tensor of this many numbers along one axis, whatever other axes of length 1 it has."""
    shape = t.shape(role)
    if [n for n in shape if n != 1] not in ([size], []) or math.prod(shape) != size:
        raise MisfitError(f"{t.key(role)} has shape {shape}, want {size} numbers: of another base model", (True, True))
    return _owned(t.read(role, shape).reshape(size))


def _low_rank(t: Tensors, down: np.ndarray, up: np.ndarray, alpha: float) -> list[LowRank]:
    """Factors (rank, in, ...) and (out, rank) in our layout; for a fused kernel, a part of `up` for each."""
    rules = t.module.weight
    ours = _owned(LAYOUTS[rules[0].layout].ours(down))
    parts = np.split(up, rules[0].parts)
    return [LowRank(ours, _owned(parts[rule.part].T), np.float32(alpha)) for rule in rules]


def _tucker(core: np.ndarray, down: np.ndarray) -> np.ndarray:
    """A core (rank, rank, ...) and a factor (rank, in) as one factor (rank, in, ...), in float32."""
    return np.einsum("ij...,jk->ik...", _float32(core), _float32(down))


def _parts(rules: tuple[Rule, ...], whole: np.ndarray) -> list[np.ndarray]:
    """A whole foreign array in our layout, or its parts for each of the rules."""
    parts = np.split(whole, rules[0].parts)
    return [_owned(LAYOUTS[rule.layout].ours(parts[rule.part])) for rule in rules]


def _vectors(rules: tuple[Rule, ...], vector: np.ndarray) -> list[np.ndarray]:
    parts = np.split(vector, rules[0].parts)
    return [parts[rule.part] for rule in rules]


def _owned(array: np.ndarray) -> np.ndarray:
    """A copy: the file may be overwritten."""
    return np.array(array, order="C")


def _float32(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.float32)
