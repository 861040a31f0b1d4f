"""What the text of a program that was compiled for TPUs says of its cost."""

import base64
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all", "reduce-scatter")
_BITS = {"pred": 8, "bf16": 16}
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)")
_SHAPE = re.compile(r"([a-z]+\d*)\w*\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")


class Instruction(NamedTuple):
    """One line of a computation. shape: as it is written; rest: its operands and everything behind them."""

    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.rest.partition(")")[0])

    def called(self, attribute: str) -> str:
        """The name of the computation that an attribute names."""
        found = re.search(rf"\b{attribute}=%([\w.-]+)", self.rest)
        return found[1] if found else ""


Computation = dict[str, Instruction]


def facts(compiled: Any) -> dict[str, Any]:
    """Bytes, FLOP and cycles of a compiled program, on each device: see `text_facts` for what its text says.

    arguments, temporaries: bytes of memory. flop: as the compiler counts, with padded lanes, and a loop once.
    """
    memory = compiled.memory_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "flop": compiled.cost_analysis().get("flops", 0.0),
        **text_facts(compiled.as_text()),
    }


def text_facts(text: str) -> dict[str, Any]:
    """What the text says. The body of a loop counts as often as the compiler knows that it runs, or once.

    Returns:
        cycles: the sum of the compiler's estimates. Kernels and collectives have none.
        kernels, grid: Mosaic kernels, and the products of their grids, together.
        collectives: kind -> their number, and bytes of their results.
        copied, copied_arguments: bytes of copies into another layout, and of those whose source is an argument.
    """
    computations = parse(text)
    cycles = kernels = grid = copied = copied_arguments = 0
    collectives: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for computation, instruction, times, fused in run_through(computations):
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            collectives[kind][0] += times
            collectives[kind][1] += times * largest(instruction.shape)
        if fused:
            continue
        cycles += times * estimate(instruction)
        if is_kernel(instruction):
            kernels += times
            grid += times * blocks(instruction)
        if changes_layout(instruction, computation):
            copied += times * largest(instruction.shape)
            if computation is computations["ENTRY"] and source(instruction, computation).opcode == "parameter":
                copied_arguments += largest(instruction.shape)
    return {
        "cycles": cycles,
        "kernels": kernels,
        "grid": grid,
        "collectives": dict(collectives),
        "copied": copied,
        "copied_arguments": copied_arguments,
    }


def parse(text: str) -> dict[str, Computation]:
    """The computations by name; the entry's name is "ENTRY"."""
    computations: dict[str, Computation] = {}
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            computations["ENTRY" if head[1] else head[2]] = current = {}
        elif found := _INSTRUCTION.match(line):
            current[found[1]] = Instruction(*found.groups())
    return computations


def run_through(
    computations: dict[str, Computation], name: str = "ENTRY", times: int = 1, fused: bool = False
) -> Iterator[tuple[Computation, Instruction, int, bool]]:
    """Every instruction with its computation, how often it runs, and whether it is a part of another."""
    for instruction in computations[name].values():
        yield computations[name], instruction, times, fused
        if instruction.opcode == "while":
            known = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.rest)
            trips = int(known[1]) if known else 1
            for attribute in ("condition", "body"):
                yield from run_through(computations, instruction.called(attribute), times * trips, fused)
        elif instruction.opcode == "fusion":
            yield from run_through(computations, instruction.called("calls"), times, True)
        elif instruction.opcode in ("call", "async-start"):
            called = instruction.called("to_apply") or instruction.called("calls")
            yield from run_through(computations, called, times, fused)
        elif instruction.opcode == "conditional":
            branches = re.findall(
                r"%([\w.-]+)", "".join(re.findall(r"branch_computations=\{(.*?)\}", instruction.rest))
            )
            for branch in branches or [instruction.called(f"{value}_computation") for value in ("true", "false")]:
                yield from run_through(computations, branch, times, fused)


def estimate(instruction: Instruction) -> int:
    found = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
    return int(found[1]) if found else 0


def is_kernel(instruction: Instruction) -> bool:
    return instruction.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in instruction.rest


def blocks(kernel: Instruction) -> int:
    """The product of a kernel's grid, which its compiled module keeps; 1 where there is none."""
    found = re.search(r'"body":"([^"]*)"', kernel.rest)
    return math.prod(grid_of(base64.b64decode(found[1]))) if found else 1


def grid_of(module: bytes) -> list[int]:
    from jax._src.lib import tpu
    from jax._src.lib.mlir import ir

    with ir.Context() as context:
        context.allow_unregistered_dialects = True
        tpu.register_dialect(context)
        found = re.search(r"iteration_bounds = array<i64: ([\d, ]+)>", str(ir.Module.parse(module)))
    return json.loads(f"[{found[1]}]") if found else []


def changes_layout(instruction: Instruction, computation: Computation) -> bool:
    """Whether it is a copy into another order of axes or other tiles. Copies between memories are not."""
    if instruction.opcode == "transpose":
        return True
    if instruction.opcode not in ("copy", "copy-start"):
        return False
    return layout(instruction.shape) != layout(computation[instruction.operands[0]].shape)


def source(copy: Instruction, computation: Computation) -> Instruction:
    """What it copies, perhaps out of another memory."""
    found = computation[copy.operands[0]]
    while found.opcode in ("bitcast", "copy", "copy-done", "copy-start"):
        found = computation[found.operands[0]]
    return found


def layout(shape: str) -> tuple[str, str]:
    """The order of axes and the tiles of an array, of a tuple's first, without the memory that it lies in."""
    found = _SHAPE.search(shape)
    assert found, shape
    return found[3] or "", re.sub(r"S\(\d+\)", "", found[4] or "")


def largest(shape: str) -> int:
    """Bytes of an array, of a tuple's largest, without padding."""

    def size(kind: str, sides: str) -> int:
        bits = _BITS.get(kind) or int(re.sub(r"\D", "", kind) or 8)
        return math.prod(map(int, sides.split(",") if sides else [])) * bits // 8

    return max((size(found[1], found[2]) for found in _SHAPE.finditer(shape)), default=0)
