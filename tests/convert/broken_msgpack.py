"""Files of flax that are broken: their bytes, and words of the refusal."""


def text(value):
    return b"\xd9" + bytes([len(value)]) + value.encode()


def items(**entries):
    return bytes([0x80 + len(entries)]) + b"".join(text(name) + value for name, value in entries.items())


def numbers(*values):
    return bytes([0x90 + len(values)]) + b"".join(b"\xcf" + value.to_bytes(8, "big") for value in values)


SHAPE, FLOAT32 = numbers(2), text("float32")


def array(shape=SHAPE, dtype=FLOAT32, data=b"\xc4\x08" + bytes(8), *, start=b"\x93", kind=1, size=None):
    content = start + shape + dtype + data
    return b"\xc9" + (len(content) if size is None else size).to_bytes(4, "big") + bytes([kind]) + content


def pieces(shape=None, chunks=None, mark=b"\xc3", **more):
    shape = items(**{"0": b"\x04"}) if shape is None else shape
    chunks = items(**{"0": array(), "1": array()}) if chunks is None else chunks
    return items(__msgpack_chunked_array__=mark, shape=shape, chunks=chunks, **more)


BROKEN = {
    "nothing else": (b"\x81\xa1", ["truncated", "2 bytes"]),
    "a number": (items(x=b"\x05"), ["'x' is 5", "want an array"]),
    "a mark": (items(x=b"\xc3"), ["'x' is True"]),
    "null": (items(x=b"\xc0"), ["'x' is a null", "want an array"]),
    "a negative number": (items(x=b"\xff"), ["'x' is a signed integer"]),
    "a float": (items(x=b"\xcb" + bytes(8)), ["'x' is a float"]),
    "a string": (items(x=text("y")), ["'x' is a string"]),
    "bytes": (items(x=b"\xc4\0"), ["'x' is a bytes"]),
    "a list": (items(x=b"\x91\x01"), ["'x' is a list"]),
    "a byte that msgpack never uses": (items(x=b"\xc1"), ["'x'"]),
    "a complex number": (items(x=array(kind=2)), ["'x'", "type 2"]),
    "an extension that is not Flax's": (items(x=array(kind=255)), ["'x'", "type 255"]),
    "no list": (items(x=array(start=b"\x83")), ["'x'", "a list of shape"]),
    "a list of two": (items(x=array(start=b"\x92")), ["'x'", "a list of shape"]),
    "a shape that is a number": (items(x=array(b"\x02")), ["'x'", "as its shape"]),
    "a negative size": (items(x=array(b"\x91\xff")), ["'x'", "whole numbers"]),
    "a size of a string": (items(x=array(b"\x91" + text("2"))), ["'x'", "whole numbers"]),
    "a size without end": (items(x=array(numbers(2**63))), ["'x'", "whole numbers"]),
    "too many dimensions": (items(x=array(b"\xdc\0\x40" + b"\1" * 64)), ["'x'", "up to 32 whole numbers"]),
    "a shape of four billion": (items(x=array(b"\xdd\xff\xff\xff\xff")), ["'x'", "whole numbers"]),
    "sizes that no array has": (items(x=array(numbers(0, 2**47, 2**47), data=b"\xc4\0")), ["'x'", "no array"]),
    "a dtype": (items(x=array(dtype=text("float8_e4m3fn"))), ["'x'", "'float8_e4m3fn'", "accepted: float64, float32"]),
    "an object": (items(x=array(dtype=text("object"))), ["'x'", "'object'"]),
    "a dtype that is a number": (items(x=array(dtype=b"\4")), ["'x'", "want a string", "integer"]),
    "a dtype of another script": (items(x=array(dtype=b"\xa1\xff")), ["'x'", "UTF-8"]),
    "too little data": (items(x=array(data=b"\xc4\7" + bytes(7))), ["'x'", "takes 8 bytes", "it has 7"]),
    "too much data": (items(x=array(data=b"\xc4\x0c" + bytes(12))), ["'x'", "takes 8 bytes", "it has 12"]),
    "data that is text": (items(x=array(data=text("01234567"))), ["'x'", "want bytes"]),
    "data beyond its array": (items(x=array(size=20)), ["'x'", "want bytes that end with the array"]),
    "an array beyond its data": (items(x=array(size=40)), ["'x'", "want bytes that end with the array"]),
    "data beyond the file": (items(x=array(numbers(2**20), data=b"\xc6\0\x40\0\0", size=25 + 2**22)), ["truncated"]),
    "a key that is a number": (b"\x82" + text("x") + array() + b"\1" + array(), ["want a string", "integer"]),
    "a key of another script": (b"\x82" + text("x") + array() + b"\xa1\xff" + array(), ["UTF-8"]),
    "a key without end": (b"\x82" + text("x") + array() + b"\xdb\xff\xff\xff\xff", ["4294967295 bytes"]),
    "a long key": (b"\x81\xda\2\1" + b"x" * 513 + array(), ["513 bytes"]),
    "a key twice": (b"\x82" + 2 * (text("x") + array()), ["'x' is there twice"]),
    "a map twice": (items(a=b"\x82" + 2 * (text("x") + items())), ["'a.x' is there twice"]),
    "a name twice": (b"\x82" + text("a.b") + array() + text("a") + items(b=array()), ["'a.b' is there twice"]),
    "a name with a slash twice": (b"\x82" + text("a/b") + array() + text("a") + items(b=array()), ["'a.b' is there"]),
    "a map without end": (b"\xdf\xff\xff\xff\xff" + text("x"), ["more than 262144 entries"]),
    "a map that is cut": (b"\xde\xff\xff" + text("x") + array(), ["truncated"]),
    "deep": ((b"\x81" + text("a")) * 4000 + items(), ["'a.a.", "more than 32 deep"]),
    "deep and long": ((b"\x81" + text("a" * 100)) * 30 + items(), ["more than 512 characters", "…"]),
    "bytes behind its end": (items(x=array()) + b"\0", ["goes on after its end"]),
    "two maps": (2 * items(x=array()), ["goes on after its end"]),
    "a name for a terminal": (items(**{"x\n\x1b[2J": b"\xc0"}), [r"'x\n\x1b[2J' is a null"]),
    "pieces that are not marked": (items(x=pieces(mark=b"\xc2")), ["'x.__msgpack_chunked_array__' is a false"]),
    "pieces marked otherwise": (items(x=pieces(mark=b"\2")), ["'x'", "shape and chunks"]),
    "pieces and more": (items(x=pieces(y=array())), ["'x'", "nothing else"]),
    "pieces without a shape": (items(x=items(__msgpack_chunked_array__=b"\xc3", chunks=items())), ["'x'", "shape"]),
    "no pieces": (items(x=pieces(chunks=items())), ["'x'", "pieces of one dtype"]),
    "a piece that is none": (items(x=pieces(chunks=items(**{"0": b"\1"}))), ["'x'", "pieces of one dtype"]),
    "pieces of other numbers": (items(x=pieces(chunks=items(**{"1": array()}))), ["'x'", "numbered"]),
    "sizes of other numbers": (items(x=pieces(items(**{"1": b"\4"}))), ["'x'", "numbered"]),
    "pieces of two dtypes": (
        items(x=pieces(chunks=items(**{"0": array(), "1": array(dtype=text("int32"))}))),
        ["'x'", "one dtype"],
    ),
    "a piece too many": (items(x=pieces(items(**{"0": b"\3"}))), ["'x'", "takes 12 bytes, its pieces 16"]),
    "pieces of what no array is": (
        items(x=pieces(items(**{str(i): b"\xcf" + (2**47).to_bytes(8, "big") for i in range(2)}))),
        ["'x'", "no array"],
    ),
}
