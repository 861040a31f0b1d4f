"""Files of torch, built byte by byte: a zip of a pickle, whose operations are written out, and of storages."""

import struct
import zlib

import numpy as np

ARRAY = np.arange(12, dtype=np.float32).reshape(3, 4)


def write(path, content):
    path.write_bytes(content)
    return path


def integer(number):
    return b"\x8a\x08" + number.to_bytes(8, "little", signed=True)


def text(string):
    raw = string.encode("utf-8", "surrogatepass")
    return b"X" + len(raw).to_bytes(4, "little") + raw


def name(full):
    module, _, last = full.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def several(*items):
    return b"(" + b"".join(items) + b"t"


def mapping(items, start=b"}"):
    return start + b"(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def numbers(values):
    return several(*map(integer, values))


def storage(key="0", kind="torch.FloatStorage", size=12):
    return several(text("storage"), name(kind), text(key), text("cpu"), integer(size)) + b"Q"


ORDERED = name("collections.OrderedDict") + b")R"


def tensor(held=None, offset=0, shape=(3, 4), strides=(4, 1), function="torch._utils._rebuild_tensor_v2"):
    held = storage() if held is None else held
    arguments = several(held, integer(offset), numbers(shape), numbers(strides), b"\x89", ORDERED)
    return name(function) + arguments + b"R"


def zip_bytes(records, *, zip64=False, comment=b"", change=None):
    """A zip file; `change` edits the list of entries (header fields) before they are written."""
    entries = [
        {
            "name": n.encode(),
            "local": n.encode(),
            "data": data,
            "crc": zlib.crc32(data),
            "size": len(data),
            "flags": 0x808,
        }
        for n, data in records.items()
    ]
    out, directory, count = bytearray(), bytearray(), 0
    for e in entries:
        e |= {"method": 0, "packed": e["size"], "at": None}
    for e in (change or (lambda entries: entries))(entries):
        at = len(out) if e["at"] is None else e["at"]
        if e["at"] is None:
            out += struct.pack("<4s5H3L2H", b"PK\3\4", 0, e["flags"], e["method"], 0, 0, 0, 0, 0, len(e["local"]), 6)
            out += e["local"] + b"FB\2\0ZZ" + e["data"]
        extra = struct.pack("<2H3Q", 1, 24, e["size"], e["packed"], at) if zip64 else b""
        sizes = (2**32 - 1,) * 3 if zip64 else (e["packed"], e["size"], at)
        directory += struct.pack(
            "<4s6H3L5H2L", b"PK\1\2", 0, 0, e["flags"], e["method"], 0, 0, e["crc"], *sizes[:2],
            len(e["name"]), len(extra), 0, 0, 0, 0, sizes[2],
        )  # fmt: skip
        directory += e["name"] + extra
        count += 1
    start, size = len(out), len(directory)
    out += directory
    if zip64:
        end = len(out)
        out += struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 0, 0, 0, 0, count, count, size, start)
        out += struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
        count, size, start = 0xFFFF, 2**32 - 1, 2**32 - 1
    return bytes(out) + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, size, start, len(comment)) + comment


def torch_bytes(code, storages=None, extra=None, **options):
    """A torch file whose pickle is these operations."""
    storages = {"0": ARRAY.tobytes()} if storages is None else storages
    records = {"a/data.pkl": b"\x80\2" + code + b".", "a/byteorder": b"little"}
    records |= {f"a/data/{key}": data for key, data in storages.items()} | {"a/version": b"3\n"}
    return zip_bytes(records | (extra or {}), **options)


def torch_file(path, code, storages=None, **options):
    return write(path, torch_bytes(code, storages, **options))


def edit(index, **fields):
    return lambda entries: [e | fields if i == index else e for i, e in enumerate(entries)]
