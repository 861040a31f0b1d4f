"""Interprets the pickle inside a torch file without executing anything that it names.

Python's own unpickler imports and calls what a pickle says. This one is a small stack machine (`pickletools` decodes
the arguments of its operations). It builds lists, dicts, tuples and scalars, knows the few torch functions that write
tensors, and imports nothing. Names that training frameworks leave beside the weights (callbacks, settings, optimizers)
become inert `Named` values; every other name, such as os.system, is refused.

It does not recurse, no opcode copies what another has built, and their number is limited: neither deep nesting nor
sharing through the memo makes it slow or large.
"""

import dataclasses
import io
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from convert.tensor_file import CheckpointError, is_count, quoted

PICKLE_LIMIT = 2**26  # bytes; a tensor takes about 150
OPCODE_LIMIT = 4_000_000  # a tensor takes about 40

STORAGES = {
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
    "torch.storage.UntypedStorage": np.dtype(np.uint8),
    "torch.UntypedStorage": np.dtype(np.uint8),
}
REBUILD = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
# torch writes dtypes that have no storage class, such as float8 and uint16, through v3.
REBUILD_V3 = "torch._utils._rebuild_tensor_v3"
REBUILD_PARAMETER = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
UNDERSTOOD = frozenset({"collections.OrderedDict", *REBUILD, REBUILD_V3, *REBUILD_PARAMETER, *STORAGES})

# What real checkpoints hold beside their tensors. A name of these is carried around and never acted on.
TYPES = (bool, bytearray, bytes, complex, dict, float, frozenset, int, list, object, set, slice, str, tuple)
INERT = frozenset(
    {
        "_codecs.encode",  # how protocol 2 writes bytes
        "argparse.Namespace",
        "collections.Counter",
        "collections.defaultdict",
        "pathlib.Path",
        "pathlib.PosixPath",
        "pathlib.WindowsPath",
        "torch.Size",
        "torch.device",
        "typing.Any",
        *(f"numpy.{name}" for name in ("dtype", "ndarray")),
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
        *(f"builtins.{kind.__name__}" for kind in TYPES),
        *(f"__builtin__.{kind.__name__}" for kind in TYPES),  # Python 2's names, which protocol 2 writes
        "__builtin__.long",
        "__builtin__.unicode",
    }
)
INERT_PATTERN = re.compile(
    r"torch\.(bool|b?float\d+\w*|complex\d+|u?int\d+)"  # dtypes
    # Classes only, told by their capital: functions of these packages may do anything.
    r"|(pytorch_lightning|lightning|lightning_fabric|omegaconf|torch\.optim)\.([a-z_]\w*\.)*_?[A-Z]\w*",
    re.ASCII,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Named:
    """A name in the pickle: a class, a function, or an inert object made from one."""

    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class Storage:
    """A record of raw numbers in the archive: its key there, its dtype, and the claimed number of elements."""

    key: str
    dtype: np.dtype
    size: int


@dataclasses.dataclass(frozen=True, eq=False)
class StoredTensor:
    """A strided view of a storage; offset and strides count elements. None is negative; bounds are not checked yet."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def interpret(pickle: np.ndarray, storages: Mapping[str, int], rebuild: Callable[[StoredTensor], Any]) -> Any:
    """The object that a torch pickle describes.

    Args:
        pickle: Its bytes (uint8).
        storages: The archive's storage records, key -> size in bytes.
        rebuild: Makes the value that represents a tensor.

    Returns:
        The object.

    Raises:
        CheckpointError: The pickle is damaged, or has a name or operation that is not on the list.
    """
    if len(pickle) > PICKLE_LIMIT:
        raise CheckpointError(f"its pickle has {len(pickle)} bytes; accepted: up to {PICKLE_LIMIT}")
    machine = _Machine(storages, rebuild)
    stream = io.BytesIO(pickle.tobytes())
    for _ in range(OPCODE_LIMIT):
        opcode, argument = _next_operation(stream)
        if opcode == "STOP":
            return machine.result()
        machine.step(opcode, argument)
    raise CheckpointError(f"its pickle has more than {OPCODE_LIMIT} operations")


OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}


def _next_operation(stream: io.BytesIO) -> tuple[str, Any]:
    opcode = OPCODES.get(stream.read(1)) or _damaged()
    try:
        if opcode.name == "GLOBAL":  # two lines as they are; pickletools would undo escapes, which pickle does not
            return opcode.name, [stream.readline().rstrip(b"\n").decode("utf-8") for _ in range(2)]
        # The other text forms, all of protocol 0, take the most code to decode: they are refused undecoded.
        if opcode.arg is None or opcode.proto == 0:
            return opcode.name, None
        return opcode.name, opcode.arg.reader(stream)
    except ValueError as error:
        raise CheckpointError("its pickle is damaged or truncated") from error


INTEGERS = ("BININT", "BININT1", "BININT2", "LONG1")
TEXTS = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8")
LITERALS = frozenset((*INTEGERS, "BINFLOAT", *TEXTS))
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    def __init__(self, storages: Mapping[str, int], rebuild: Callable[[StoredTensor], Any]):
        self.storages = storages
        self.rebuild = rebuild
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each MARK
        self.memo: dict[int, Any] = {}

    def result(self) -> Any:
        if self.below or len(self.stack) != 1:
            _damaged()
        return self.stack[0]

    def step(self, opcode: str, argument: Any) -> None:
        """Executes one operation. Torch never writes those missing here, such as INST, OBJ, EXT1 and the text forms."""
        match opcode:
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.top()
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.top()
            case "BINGET" | "LONG_BINGET":
                self.push(self.memo[argument] if argument in self.memo else _damaged())
            case _ if opcode in LITERALS:
                self.push(argument)
            case _ if opcode in CONSTANTS:
                self.push(CONSTANTS[opcode])
            case _ if opcode in TUPLES:
                self.push(tuple(reversed([self.pop() for _ in range(TUPLES[opcode])])))
            case "MARK":
                self.below.append(self.stack)
                self.stack = []
            case "TUPLE":
                items = self.pop_mark()
                self.push(tuple(items))
            case "POP":
                self.pop()
            case "POP_MARK":
                self.pop_mark()
            case "EMPTY_LIST":
                self.push([])
            case "EMPTY_DICT":
                self.push({})
            case "EMPTY_SET":
                self.push(Named("builtins.set"))
            case "FROZENSET":
                self.pop_mark()
                self.push(Named("builtins.frozenset"))
            case "APPEND":
                self.extend([self.pop()])
            case "APPENDS" | "ADDITEMS":
                self.extend(self.pop_mark())
            case "SETITEM":
                value = self.pop()
                self.update([self.pop(), value])
            case "SETITEMS":
                self.update(self.pop_mark())
            case "GLOBAL":
                self.push(_named(*argument))
            case "STACK_GLOBAL":
                name = self.pop()
                self.push(_named(self.pop(), name))
            case "REDUCE" | "NEWOBJ":
                arguments = self.pop()
                self.push(self.call(self.pop(), arguments))
            case "NEWOBJ_EX":
                self.pop()
                arguments = self.pop()
                self.push(self.call(self.pop(), arguments))
            case "BUILD":
                self.pop()
                self.build()
            case "BINPERSID":
                self.push(self.storage(self.pop()))
            case "PROTO" | "FRAME":
                pass
            case _:
                raise CheckpointError(f"its pickle uses {opcode}, which torch never writes: refused")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        return self.stack.pop() if self.stack else _damaged()

    def top(self) -> Any:
        return self.stack[-1] if self.stack else _damaged()

    def pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.below.pop() if self.below else _damaged()
        return items

    def extend(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(items)
        elif not _is_inert(target):
            raise CheckpointError(f"its pickle appends to {_kind(target)}: refused")

    def update(self, items: list[Any]) -> None:
        target = self.top()
        if len(items) % 2:
            _damaged()
        if _is_inert(target):
            return
        if not isinstance(target, dict):
            raise CheckpointError(f"its pickle sets items of {_kind(target)}: refused")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not _is_key(key):
                raise CheckpointError(f"its pickle uses {_kind(key)} as a dict key: refused")
            if key in target:
                shown = key if isinstance(key, str) else repr(key)
                raise CheckpointError(f"{quoted(shown)} is there twice in one dict")
            target[key] = value

    def build(self) -> None:
        # A state is set on inert objects, and on state dicts, where it is `_metadata`: neither needs it.
        target = self.top()
        if not (_is_inert(target) or isinstance(target, OrderedDict)):
            raise CheckpointError(f"its pickle sets the state of {_kind(target)}: refused")

    def call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Named) or not isinstance(arguments, tuple):
            raise CheckpointError(f"its pickle calls {_kind(function)}: refused")
        match function.name, arguments:
            case "collections.OrderedDict", ():
                return OrderedDict()
            case name, (Storage() as storage, offset, tuple(shape), tuple(strides), *_) if name in REBUILD:
                if len(shape) == len(strides) and all(is_count(n) for n in (offset, *shape, *strides)):
                    return self.rebuild(StoredTensor(storage, offset, shape, strides))
            case name, (StoredTensor() | np.ndarray() as tensor, *_) if name in REBUILD_PARAMETER:
                return tensor
            case name, (_, _, _, _, _, _, Named(name=dtype), *_) if name == REBUILD_V3:
                accepted = ", ".join(str(dtype) for dtype in dict.fromkeys(STORAGES.values()))
                raise CheckpointError(f"holds a tensor of dtype {dtype}; accepted: {accepted}")
        if function.name in UNDERSTOOD:
            raise CheckpointError(f"its pickle calls {function.name} in a way that torch never does: refused")
        return Named(function.name)

    def storage(self, identity: Any) -> Storage:
        match identity:
            case ("storage", Named(name=kind), str(key), str(), size) if kind in STORAGES and is_count(size):
                storage = Storage(key, STORAGES[kind], size)
            case _:
                raise CheckpointError(
                    "its pickle holds a persistent id that is not a storage of a known dtype: refused"
                )
        if key not in self.storages:
            raise CheckpointError(f"has no storage record {quoted(key)}, which its pickle points to")
        if size * storage.dtype.itemsize > self.storages[key]:
            raise CheckpointError(
                f"claims {size} elements of {storage.dtype} in storage record {quoted(key)}, "
                f"which has {self.storages[key]} bytes"
            )
        return storage


def _named(module: Any, name: Any) -> Named:
    if not isinstance(module, str) or not isinstance(name, str):
        _damaged()
    full = f"{module}.{name}"
    # A dot in the name itself asks for an attribute of an attribute, the way around a list of names.
    if "." not in name and (full in UNDERSTOOD or full in INERT or INERT_PATTERN.fullmatch(full)):
        return Named(full)
    raise CheckpointError(
        f"its pickle names {quoted(full)}, which weights do not need: refused (nothing was run); "
        "save the tensors alone, best as .safetensors"
    )


def _is_inert(value: Any) -> bool:
    return isinstance(value, Named) and value.name not in UNDERSTOOD


def _is_key(value: Any) -> bool:
    # Tuples would be hashed by recursion, and of longer integers many can be made to collide.
    return (
        value is None
        or isinstance(value, str | bytes | float | Named)
        or (isinstance(value, int) and value.bit_length() <= 64)
    )


def _kind(value: Any) -> str:
    return quoted(value.name) if isinstance(value, Named) else f"a {type(value).__name__}"


def _damaged() -> NoReturn:
    raise CheckpointError("its pickle is damaged")
