"""A network of torch in the libraries that people would use instead: torch as it is, torch.compile, OpenVINO.

A network takes and gives images channels first there and channels last here: every array of rank 4 is one.
"""

import argparse
import functools
import gc
import importlib.metadata
import importlib.util
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from turns import Load, Step, torch_facts

# OpenVINO, which torch.compile imports as well, would report its use over the network, by forks of this process.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # None: to import it raises ImportError

COMPILERS = ("torch.compile", "openvino")
# Makes the network, a torch.nn.Module in float32. Pickled, as turns.Load is.
Make = Callable[[], Any]
PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}


def add_peers(parser: argparse.ArgumentParser, library: str) -> None:
    """The argument --peers. library: whose network it is, which is a peer under this name."""
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=(library, *COMPILERS),
        default=[library],
        help=f"what ours is compared with; outputs with the first ({library}); openvino needs `pip install openvino`",
    )


def check_peers(peers: Sequence[str]) -> None:
    """Raises SystemExit for a package that is missing."""
    if importlib.util.find_spec("torch") is None:
        raise SystemExit("--peers: torch is not installed; this benchmark needs the extra `parity`")
    if "openvino" in peers and importlib.util.find_spec("openvino") is None:
        raise SystemExit("--peers: openvino is not installed; `pip install openvino`")


def peer_loads(
    peers: Sequence[str], library: str, make: Make, arrays: Sequence[np.ndarray], dtype: str
) -> dict[str, Load]:
    """What `turns.processes_in_turns` loads for each of the peers. arrays: the network's inputs, as ours takes them."""
    return {name: functools.partial(load_peer, name, library, make, arrays, dtype) for name in dict.fromkeys(peers)}


def load_peer(
    name: str, library: str, make: Make, arrays: Sequence[np.ndarray], dtype: str
) -> tuple[Step, dict[str, Any]]:
    """One of them, compiled, where it compiles."""
    import torch

    module, inputs = make().eval(), channels_first(arrays)
    facts = torch_facts(library if name == library else name) | {"gflop": count_gflop(module, inputs)}
    if name == "openvino":
        run, more = openvino_run(module, inputs, dtype)
        del module
        gc.collect()
        return lambda: channels_last(run()).copy(), facts | more
    device, kind = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, dtype)
    inputs = [x.to(device, kind if x.is_floating_point() else x.dtype) for x in inputs]
    run = torch_run(module.to(device, kind), inputs, compiled=name == "torch.compile")

    def step() -> np.ndarray:
        return channels_last(run().float().cpu().numpy())

    if name == "torch.compile":
        started = time.perf_counter()
        step()
        facts["compile_s"] = time.perf_counter() - started
    return step, facts


def as_module(network: Any, call: Callable[..., Any]) -> Any:
    """A torch.nn.Module of tensors, whose result is call(network, *tensors), one tensor."""
    import torch

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, *tensors: Any) -> Any:
            return call(self.network, *tensors)

    return Module()


def torch_run(module: Any, inputs: Sequence[Any], *, compiled: bool = False) -> Callable[[], Any]:
    """A call of the module without gradients. compiled: by torch.compile, in the first one."""
    import torch

    call = torch.compile(module) if compiled else module

    def run() -> Any:
        with torch.no_grad():
            return call(*inputs)

    return run


def openvino_run(module: Any, inputs: Sequence[Any], dtype: str) -> tuple[Callable[[], np.ndarray], dict[str, Any]]:
    """A call of the module in OpenVINO on the CPU, for these shapes; the next overwrites its result. And its facts."""
    import openvino

    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is traced is for these shapes only, as its warnings say
        shapes = [openvino.PartialShape(list(x.shape)) for x in inputs]
        converted = openvino.convert_model(module, example_input=tuple(inputs), input=shapes)
    options = {"INFERENCE_PRECISION_HINT": PRECISIONS[dtype]}
    compiled = openvino.Core().compile_model(converted, "CPU", options)
    request = compiled.create_infer_request()
    arrays = [x.numpy() for x in inputs]  # the request does not keep what it shares
    for index, array in enumerate(arrays):
        request.set_input_tensor(index, openvino.Tensor(array, shared_memory=True))

    def run() -> np.ndarray:
        assert arrays
        request.infer()
        return request.get_output_tensor(0).data

    return run, {
        "library": f"OpenVINO {importlib.metadata.version('openvino')}",
        "threads": compiled.get_property("INFERENCE_NUM_THREADS"),
        "compile_s": time.perf_counter() - started,
    }


def count_gflop(module: Any, inputs: Sequence[Any]) -> float:
    """What a call's products, convolutions and attention take by their definitions, whoever computes them how.

    What a compiler counts of its own program follows the form of that, and counts the body of a loop once.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    # Shapes suffice. Here attention is products, which the counter knows, as it does not every kernel of a CPU.
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    abstract = {name: tensor.to("meta") for name, tensor in state.items()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        torch.func.functional_call(module, abstract, tuple(x.to("meta") for x in inputs))
    return counter.get_total_flops() / 1e9


def channels_first(arrays: Sequence[np.ndarray]) -> list[Any]:
    """Our inputs as torch's: images channels first."""
    import torch

    return [torch.from_numpy(np.ascontiguousarray(np.moveaxis(a, -1, 1) if a.ndim == 4 else a)) for a in arrays]


def channels_last(array: np.ndarray) -> np.ndarray:
    """torch's output as ours."""
    return np.moveaxis(array, 1, -1) if array.ndim == 4 else array
