"""What a compiled program for a GPU holds, read from its text: library calls, kernels, copies of weights."""

import re
from collections.abc import Iterator
from typing import Any

from hlo import Computation, Instruction, largest, parse, run_through

_LIBRARIES = {
    "convolutions": r'target="__cudnn\$conv',
    "attentions": r'target="[^"]*fmha',
    "products": r'target="__cublas|__triton_gemm',
}
_NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"}
_MOVES = {"copy", "transpose"}
LARGE = 64 * 2**20


def program_facts(text: str) -> dict[str, Any]:
    """Counts of calls and kernels, bytes of weights that are copied to another layout, large float32 results.

    text: of the compiled program, `as_text()`. A loop's body counts once.
    """
    computations = parse(text)
    run = [(computation, one) for computation, one, _, fused in run_through(computations) if not fused]
    kernels = [one for _, one in run if one.opcode not in _NO_KERNEL]
    return {
        **{name: sum(re.search(part, one.rest) is not None for one in kernels) for name, part in _LIBRARIES.items()},
        "fusions": sum(one.opcode == "fusion" for one in kernels),
        "kernels": len(kernels),
        "moved_weights_mib": sum(largest(one.shape) for one in _moved_arguments(computations, run)) / 2**20,
        "large_float32": sum("f32[" in one.shape and largest(one.shape) > LARGE for one in kernels),
    }


def _moved_arguments(
    computations: dict[str, Computation], run: list[tuple[Computation, Instruction]]
) -> Iterator[Instruction]:
    """Copies and transpositions of what a program, or a loop's body, is given; fused ones too."""
    for computation, one in run:
        if one.opcode in _MOVES or (one.opcode == "fusion" and _only_moves(computations[one.called("calls")])):
            source = computation[one.operands[0]]
            while source.opcode in ("bitcast", "get-tuple-element"):
                source = computation[source.operands[0]]
            if source.opcode == "parameter":
                yield one


def _only_moves(fused: Computation) -> bool:
    work = {one.opcode for one in fused.values()} - {"parameter", "bitcast", "constant"}
    return bool(work) and work <= _MOVES
