"""What a compiled program for a GPU holds, read from its text: library calls, kernels, copies of weights."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

# name = type operation(operands), attributes
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.-]+)")
_BITS = {"pred": 8, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "f64": 64}
_LIBRARIES = {
    "convolutions": r'target="__cudnn\$conv',
    "attentions": r'target="[^"]*fmha',
    "products": r'target="__cublas|__triton_gemm',
}
_NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"}
_MOVES = {"copy", "transpose"}
LARGE = 64 * 2**20


class Instruction(NamedTuple):
    computation: str
    name: str
    type: str
    operation: str
    rest: str

    @property
    def operand(self) -> str:
        """The first one's name."""
        found = re.search(r"%([\w.-]+)", self.rest)
        return "" if found is None else found[1]


def program_facts(text: str) -> dict[str, Any]:
    """Counts of calls and kernels, bytes of weights that are copied to another layout, large float32 results.

    text: of the compiled program, `as_text()`.
    """
    instructions = list(parse(text))
    # Fusions and reductions have their computations; calls of graphs of kernels are part of the program.
    inner = {name for one in instructions if one.operation != "call" for name in _CALLED.findall(one.rest)}
    run = [one for one in instructions if one.computation not in inner]
    moved = sum(bytes_of(one.type) for one in _moved_arguments(instructions, run))
    large = [one for one in run if one.operation not in _NO_KERNEL and _is_large_float(one.type)]
    return {
        **{name: sum(re.search(part, one.rest) is not None for one in run) for name, part in _LIBRARIES.items()},
        "fusions": sum(one.operation == "fusion" for one in run),
        "kernels": sum(one.operation not in _NO_KERNEL for one in run),
        "moved_weights_mib": moved / 2**20,
        "large_float32": len(large),
    }


def parse(text: str) -> Iterator[Instruction]:
    computation = ""
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            computation = found[1]
        elif found := _INSTRUCTION.match(line):
            yield Instruction(computation, *found.groups())


def bytes_of(type_: str) -> int:
    """Of an array, or of all arrays of a tuple."""
    return sum(_BITS.get(kind, 0) // 8 * _size(sides) for kind, sides in _ARRAY.findall(type_))


def _size(sides: str) -> int:
    return math.prod(int(side) for side in sides.split(",") if side)


def _is_large_float(type_: str) -> bool:
    return any(kind == "f32" and 4 * _size(sides) > LARGE for kind, sides in _ARRAY.findall(type_))


def _moved_arguments(every: list[Instruction], run: list[Instruction]) -> Iterator[Instruction]:
    """Copies and transpositions of what a program, or a loop's body, is given; fused ones too."""
    work: dict[str, set[str]] = {}
    for one in every:
        if one.operation not in ("parameter", "bitcast", "constant"):
            work.setdefault(one.computation, set()).add(one.operation)
    moves = {name for name, operations in work.items() if operations <= _MOVES}
    given = {(one.computation, one.name) for one in run if one.operation == "parameter"}
    for one in run:  # in order: operands come first
        reads_given = (one.computation, one.operand) in given
        if reads_given and one.operation in ("get-tuple-element", "bitcast"):
            given.add((one.computation, one.name))
        called = _CALLED.findall(one.rest) if one.operation == "fusion" else []
        if reads_given and (one.operation in _MOVES or any(name in moves for name in called)):
            yield one
