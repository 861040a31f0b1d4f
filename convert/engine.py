"""Applies a layout's table in either direction, and proves it complete.

A table is a list of rules. A rule ties one foreign tensor (or one equal part of it) to one of our parameters (or one
layer of a stacked parameter) through a named layout. The same list read forwards imports, read backwards exports.
"""

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from convert.readers import CheckpointError, TensorInfo
from convert.tensor_file import quoted
from unclip_jax.checkpoints.checkpoint import Parameter
from unclip_jax.checkpoints.nonfinite import warn_unless_finite

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The difference in the order of axes: `ours` maps the foreign array to our layout, `foreign` back."""

    ours: Callable[[np.ndarray], np.ndarray]
    foreign: Callable[[np.ndarray], np.ndarray]


def _patch_side(rows: int) -> int:
    return round((rows / 3) ** 0.5)


LAYOUTS = {
    "same": Layout(lambda a: a, lambda a: a),
    # Linear: PyTorch keeps (out, in), we (in, out).
    "linear": Layout(lambda a: a.T, lambda a: a.T),
    # Convolution: OIHW there, HWIO here.
    "conv": Layout(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1)),
    # A 1x1 convolution there that is a Linear here.
    "pointwise": Layout(lambda a: a[:, :, 0, 0].T, lambda a: a.T[:, :, None, None]),
    # The vision tower's patch convolution (O, 3, p, p), a Linear over flattened patches (p * p * 3, O) here.
    "patch": Layout(
        lambda a: a.transpose(2, 3, 1, 0).reshape(-1, a.shape[0]),
        lambda a: a.reshape(_patch_side(a.shape[0]), -1, 3, a.shape[1]).transpose(3, 2, 0, 1),
    ),
    # The same in Flax's files, (p, p, 3, O).
    "flax patch": Layout(
        lambda a: a.reshape(-1, a.shape[-1]),
        lambda a: a.reshape(_patch_side(a.shape[0]), -1, 3, a.shape[1]),
    ),
    # One row there, a vector here.
    "row": Layout(lambda a: a[0], lambda a: a[None]),
    # One token of one image there, a vector here.
    "token": Layout(lambda a: a[0, 0], lambda a: a[None, None]),
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """foreign[part-th of `parts` along axis 0] <-> ours[layer]; parts = 1 and layer = None mean the whole tensor.

    groups: how often the parts repeat along the axis, as when every head has its own query, key and value.
    """

    foreign: str
    ours: str
    layout: str
    layer: int | None = None
    part: int = 0
    parts: int = 1
    groups: int = 1


class Table:
    """Collects the rules of a layout for one architecture; `params` are our parameters' names and shapes."""

    def __init__(self, params: Mapping[str, Any]):
        self.rules: list[Rule] = []
        self._params = params
        self._leaves: dict[str, list[str]] = defaultdict(list)
        for name in params:
            module, _, leaf = name.rpartition(".")
            self._leaves[module].append(leaf)

    def tensor(self, ours: str, foreign: str, layout: str = "same", **where: int) -> None:
        """Ties one parameter; ignored if this architecture does not have it."""
        if ours in self._params:
            self.rules.append(Rule(foreign, ours, layout, **where))

    def module(self, ours: str, foreign: str, *, layer: int | None = None, kernel: str | None = None) -> None:
        """Ties the parameters that a layer has: kernel, scale or embedding as `.weight`; bias."""
        for leaf in self._leaves.get(ours, ()):
            name = f"{ours}.{leaf}"
            if leaf == "kernel":
                axes = len(self._params[name].shape) - (layer is not None)
                layout = kernel or {2: "linear", 4: "conv"}[axes]
            else:
                layout = "same"
            self.rules.append(Rule(f"{foreign}.{'bias' if leaf == 'bias' else 'weight'}", name, layout, layer))


@dataclasses.dataclass(frozen=True)
class Unused:
    """Foreign tensors that no network reads: a full-match pattern, and the reason for people."""

    pattern: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Dialect:
    """The names that one writer gives the tensors of a part (a network, or what stands beside one).

    All names are within the part, and all patterns are full matches.

    Args:
        table: (t, prefix, config) -> None, ties the part's parameters to names that begin with `prefix`.
        sign: Matches names that only this dialect has.
        spellings: (pattern, form): other names of the same tensors, and the table's names for them.
        unused: What may be there beside them.
    """

    table: Callable[[Table, str, Any], None]
    sign: str
    spellings: tuple[tuple[str, str], ...] = ()
    unused: tuple[Unused, ...] = ()

    def canonical(self, name: str) -> str:
        """The table's form of a name within the part, whatever release or tool wrote it."""
        for pattern, form in self.spellings:
            if match := re.fullmatch(pattern, name):
                return match.expand(form)
        return name


def foreign_shape(rule: Rule, params: Mapping[str, Any]) -> Shape:
    """The shape that the foreign tensor of a rule must have."""
    shape = params[rule.ours].shape
    shape = shape if rule.layer is None else shape[1:]
    # Layouts move axes, whatever the values: a stand-in without memory shows where they go.
    stand_in = np.broadcast_to(np.empty((), np.int8), shape)
    whole = LAYOUTS[rule.layout].foreign(stand_in).shape
    return whole if rule.parts == 1 else (whole[0] * rule.parts, *whole[1:])


def prove(rules: Iterable[Rule], params: Mapping[str, Any]) -> None:
    """Checks that a table is a bijection: each of our parameters filled once, each foreign tensor used once.

    Raises:
        AssertionError: It is not. That is a mistake in the table, not in anybody's file.
    """
    slots = Counter((rule.ours, rule.layer) for rule in rules)
    wanted = {
        (name, layer)
        for name, spec in params.items()
        for layer in (range(spec.shape[0]) if (name, 0) in slots else (None,))
    }
    assert slots.keys() == wanted, f"unfilled or unknown: {sorted(map(str, slots.keys() ^ wanted))[:5]}"
    assert max(slots.values()) == 1, f"filled twice: {[s for s, n in slots.items() if n > 1][:5]}"
    parts = defaultdict(list)
    for rule in rules:
        parts[rule.foreign].append(rule)
    for name, group in parts.items():
        found = sorted(rule.part for rule in group)
        assert found == list(range(group[0].parts)), f"{name}: parts {found} of {group[0].parts}"


@dataclasses.dataclass(frozen=True)
class Report:
    """The findings of `check`: used, known-unused (with reasons), and the three kinds of trouble, each named.

    notes: further information for the user.
    """

    used: list[str]
    unused: dict[str, str]
    missing: list[str]
    misshapen: list[str]
    unknown: list[str]
    notes: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        return not (self.missing or self.misshapen or self.unknown)

    def __str__(self) -> str:
        kinds = (("missing", self.missing), ("misshapen", self.misshapen), ("unknown", self.unknown))
        return "; ".join(f"{len(names)} {kind}: {_first(names)}" for kind, names in kinds if names)


def check(
    rules: list[Rule],
    params: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    unused: Iterable[Unused],
    own: Mapping[str, str] | None = None,
) -> Report:
    """Compares a file's names, shapes and dtypes with a table; reads no tensor data.

    Args:
        rules: The table.
        params: Our parameters' names and shapes.
        tensors: The file's.
        unused: What may be there beside them.
        own: The table's name -> the file's own name, where they differ; the report uses the latter.

    Returns:
        The findings.
    """
    own = own or {}
    shapes = {rule.foreign: foreign_shape(rule, params) for rule in rules}
    missing = [f"{name} {shape}" for name, shape in shapes.items() if name not in tensors]
    misshapen = []
    for name, shape in shapes.items():
        if name not in tensors:
            continue
        info = tensors[name]
        if core_shape(info.shape) != core_shape(shape):
            misshapen.append(f"{own.get(name, name)} has shape {info.shape}, want {shape}")
        elif info.dtype.kind not in "fV":  # V: numpy's kind for bfloat16
            misshapen.append(f"{own.get(name, name)} has dtype {info.dtype}, want a floating one")
    patterns = [(re.compile(u.pattern), u.reason) for u in unused]
    known, unknown = {}, []
    for name in tensors:
        if name in shapes:
            continue
        reason = next((reason for pattern, reason in patterns if pattern.fullmatch(name)), None)
        if reason is None:
            unknown.append(f"{own.get(name, name)} {tensors[name].shape}")
        else:
            known[own.get(name, name)] = reason
    return Report([own.get(name, name) for name in shapes if name in tensors], known, missing, misshapen, unknown)


def import_params(
    rules: list[Rule],
    params: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], np.ndarray],
) -> dict[str, Parameter]:
    """Our parameters as lazy reads of a foreign file that `check` found complete."""
    by_ours: dict[str, list[Rule]] = defaultdict(list)
    for rule in rules:
        by_ours[rule.ours].append(rule)
    return {
        name: Parameter(
            spec.shape,
            np.result_type(*(tensors[rule.foreign].dtype for rule in by_ours[name])),
            tuple(
                _piece(rule, foreign_shape(rule, params), read)
                for rule in sorted(by_ours[name], key=lambda r: r.layer or 0)
            ),
        )
        for name, spec in params.items()
    }


def _piece(rule: Rule, shape: Shape, read: Callable[[str], np.ndarray]) -> Callable[[], np.ndarray]:
    def piece() -> np.ndarray:
        array = read(rule.foreign).reshape(shape)
        if rule.parts > 1:
            rows = shape[0] // rule.parts
            grouped = array.reshape(rule.groups, rule.parts, rows // rule.groups, *shape[1:])
            array = grouped[:, rule.part].reshape(rows, *shape[1:])
        ours = LAYOUTS[rule.layout].ours(warn_unless_finite(rule.foreign, array))
        return ours if rule.layer is None else ours[None]

    return piece


def export_tensors(rules: list[Rule], params: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """The table read backwards: the foreign tensors, by name, as lazy reads of our parameters."""
    by_foreign: dict[str, list[Rule]] = defaultdict(list)
    for rule in rules:
        by_foreign[rule.foreign].append(rule)
    return {
        name: Parameter(
            foreign_shape(group[0], params),
            np.result_type(*(params[rule.ours].dtype for rule in group)),
            _in_groups(
                group[0].groups,
                tuple(_foreign_piece(rule, params[rule.ours]) for rule in sorted(group, key=lambda r: r.part)),
            ),
        )
        for name, group in by_foreign.items()
    }


def _foreign_piece(rule: Rule, param: Parameter) -> Callable[[], np.ndarray]:
    def piece() -> np.ndarray:
        return LAYOUTS[rule.layout].foreign(param.read() if rule.layer is None else param.read_layer(rule.layer))

    return piece


def _in_groups(groups: int, parts: tuple[Callable[[], np.ndarray], ...]) -> tuple[Callable[[], np.ndarray], ...]:
    """The pieces of a foreign tensor whose parts alternate in this number of groups."""
    if groups == 1:
        return parts

    def whole() -> np.ndarray:
        arrays = [part() for part in parts]
        rest = arrays[0].shape[1:]
        return np.stack([a.reshape(groups, -1, *rest) for a in arrays], axis=1).reshape(-1, *rest)

    return (whole,)


def require_complete(report: Report, where: str) -> None:
    """Checks that every needed tensor is there and every other one is known.

    Raises:
        CheckpointError: It is not so.
    """
    if not report.complete:
        raise CheckpointError(f"{where}: {report}")


def core_shape(shape: Shape) -> Shape:
    """A shape without the differences between dialects: some keep a Linear as a 1x1 convolution, and vice versa.

    Convolutions have their two sides last in PyTorch's files, and first in Flax's.
    """
    if len(shape) != 4 or (1, 1) not in (shape[2:], shape[:2]):
        return shape
    return shape[:2] if shape[2:] == (1, 1) else shape[2:]


def _first(names: list[str], count: int = 5) -> str:
    shown = [name if name.isprintable() and len(name) < 200 else quoted(name) for name in names[:count]]
    return ", ".join(shown) + (f", … ({len(names) - count} more)" if len(names) > count else "")
