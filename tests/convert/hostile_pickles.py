"""Pickles that no checkpoint needs: their operations, and words of the refusal."""

from tests.convert.torch_files import ORDERED, integer, mapping, name, numbers, several, storage, tensor, text


def system(*, call=b"(X\x04\0\0\0echotR"):
    return name("os.system") + call


HOSTILE = {
    "os.system": (system(), ["'os.system'", "nothing was run"]),
    "only named": (system(call=b""), ["'os.system'"]),
    "posix.system": (name("posix.system") + several(text("id")) + b"R", ["'posix.system'"]),
    "eval": (name("builtins.eval") + several(text("1")) + b"R", ["'builtins.eval'"]),
    "old eval": (name("__builtin__.eval") + several(text("1")) + b"R", ["'__builtin__.eval'"]),
    "stack global": (text("os") + text("system") + b"\x93" + several(text("id")) + b"R", ["'os.system'"]),
    "stack global of no text": (integer(1) + text("system") + b"\x93", ["damaged"]),
    "getattr": (name("builtins.getattr") + several(name("os.system"), text("x")) + b"R", ["'builtins.getattr'"]),
    "dotted": (b"ctorch\n_utils._rebuild_tensor_v2\n", ["'torch._utils._rebuild_tensor_v2'", "do not need"]),
    "dotted inert": (text("omegaconf") + text("a.B") + b"\x93", ["'omegaconf.a.B'"]),
    "no module": (b"c\nsystem\n", ["'.system'"]),
    "line breaks": (text("os\nx") + text("y\nz") + b"\x93", [r"'os\nx.y\nz'"]),
    "endless name": (text("o" * 9999) + text("system") + b"\x93", ["…"]),
    "torch.load": (name("torch.load") + several(text("x")) + b"R", ["'torch.load'"]),
    "load_from_bytes": (name("torch.storage._load_from_bytes"), ["_load_from_bytes"]),
    "numpy helper": (name("numpy.testing._private.utils.runstring"), ["runstring"]),
    "lightning function": (name("pytorch_lightning.utilities.cloud_io.load"), ["cloud_io.load"]),
    "ext": (b"\x82\1", ["EXT1"]),
    "inst": (b"(ios\nsystem\n", ["INST"]),
    "obj": (b"(cos\nsystem\no", ["'os.system'"]),
    "obj of an inert": (b"(" + name("argparse.Namespace") + b"o", ["OBJ"]),
    "text persistent id": (b"Pstorage\n", ["PERSID"]),
    "persistent id": (several(text("module")) + b"Q", ["persistent id"]),
    "persistent id of no storage": (
        several(text("storage"), name("torch.Size"), *[text("0")] * 3) + b"Q",
        ["persistent"],
    ),
    "protocol 0": (b"(lp0\n", ["LIST"]),
    "buffers": (b"\x97", ["NEXT_BUFFER"]),
    "call of data": (text("x") + b")R", ["calls a str"]),
    "call with no tuple": (name("argparse.Namespace") + b"]R", ["refused"]),
    "tensor of an inert": (
        name("torch._utils._rebuild_tensor_v2") + several(name("torch.Size"), *[b")"] * 3) + b"R",
        ["_rebuild_tensor_v2", "never"],
    ),
    "parameter of an inert": (
        name("torch._utils._rebuild_parameter") + several(name("torch.Size"), b"\x88") + b"R",
        ["_rebuild_parameter"],
    ),
    "negative stride": (tensor(strides=(-4, 1)), ["_rebuild_tensor_v2"]),
    "strides of another length": (tensor(strides=(1,)), ["_rebuild_tensor_v2"]),
    "shape of text": (
        name("torch._utils._rebuild_tensor_v2")
        + several(storage(), integer(0), several(text("3")), numbers([1]))
        + b"R",
        ["_rebuild_tensor_v2"],
    ),
    "ordered dict of something": (name("collections.OrderedDict") + several(b"]") + b"R", ["OrderedDict"]),
    "storage called": (name("torch.FloatStorage") + b")R", ["torch.FloatStorage"]),
    "build on a dict": (b"}}b", ["state of a dict"]),
    "build on a function": (ORDERED[:-2] + b"}b", ["state of"]),
    "append to a dict": (b"}Na", ["appends to a dict"]),
    "items of a list": (b"]NNs", ["items of a list"]),
    "odd items": (b"}(Nu", ["damaged"]),
    "list as a key": (b"}]Ns", ["a list as a dict key"]),
    "tuple as a key": (b"}))s", ["a tuple as a dict key"]),
    "huge integer as a key": (b"}\x8a\x0a" + b"\x7f" * 10 + b"Ns", ["a int as a dict key"]),
    "name twice": (mapping({"w": tensor()})[:-1] + text("w") + tensor() + b"u", ["'w'", "twice"]),
    "number twice": (b"}(K\1NK\1Nu", ["'1'", "twice"]),
    "huge integer": (b"\x8b\xff\xff\xff\x7f", ["damaged"]),
    "long4": (b"\x8b\1\0\0\0\1", ["LONG4"]),
    "float8": (
        name("torch._utils._rebuild_tensor_v3")
        + several(
            storage(kind="torch.storage.UntypedStorage"),
            b"K\0",
            b")",
            b")",
            b"\x89",
            ORDERED,
            name("torch.float8_e5m2"),
        )
        + b"R",
        ["torch.float8_e5m2", "accepted: float64, float32"],
    ),
    "complex": (mapping({"w": tensor(storage(kind="torch.ComplexFloatStorage"))}), ["ComplexFloatStorage"]),
    "nothing": (b"", ["damaged"]),
    "two values": (b"NN", ["damaged"]),
    "open mark": (b"(N", ["damaged"]),
    "underflow": (b"0", ["damaged"]),
    "underflow at a mark": (b"N(0", ["damaged"]),
    "no mark": (b"t", ["damaged"]),
    "nothing to remember": (b"q\1", ["damaged"]),
    "nothing remembered": (b"h\1", ["damaged"]),
    "truncated text": (b"X\xff\0\0\0abc", ["damaged or truncated"]),
    "unknown operation": (b"\xff", ["damaged"]),
    "escaped": (b"cargparse\nN\\x61mespace\n", [r"'argparse.N\\x61mespace'"]),
    "not in utf-8": (b"c\xff\nx\n", ["damaged"]),
    "old text": (b"S'\\o'\n", ["STRING"]),
    "missing storage": (tensor(storage(key="../7")), ["'../7'"]),
    "huge storage": (tensor(storage(size=2**40)), [str(2**40), "'0'", "48 bytes"]),
    "slightly larger storage": (tensor(storage(size=13)), ["13", "48 bytes"]),
    "absurd storage": (tensor(storage(size=2**62)), ["persistent id"]),
}
