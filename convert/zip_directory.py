"""Strict reading of a zip file's directory: where each record's bytes are. Nothing is unpacked.

Follows APPNOTE.TXT, PKWARE's description of the format, whose section numbers are given below. Python's `zipfile` is
lenient where a checkpoint should not be (names twice, overlapping records), and keeps half a kilobyte for each entry
that a hostile directory lists.
"""

import mmap
import struct
import zlib
from typing import NamedTuple

import numpy as np

from convert.tensor_file import CheckpointError, mapped_bytes, quoted

LOCAL = struct.Struct("<4s5H3L2H")  # 4.3.7
ENTRY = struct.Struct("<4s6H3L5H2L")  # 4.3.12
END64 = struct.Struct("<4sQ2H2L4Q")  # 4.3.14
LOCATOR64 = struct.Struct("<4sLQL")  # 4.3.15
END = struct.Struct("<4s4H2LH")  # 4.3.16
RECORD_LIMIT = 2**18
ENCRYPTED, UTF8 = 0x1, 0x800  # 4.4.4
IN_EXTRA = 0xFFFFFFFF  # 4.4.8: the number is too large for here and stands in the extra field


class Record(NamedTuple):
    """The bytes [start, end) of the file; plain: as they are, neither compressed nor encrypted.

    crc: their checksum; 0 if the writer was told not to compute it.
    """

    start: int
    end: int
    crc: int
    plain: bool


def read_directory(mapping: mmap.mmap) -> dict[str, Record]:
    """Name -> record of a mapped zip file.

    Every record is proved to lie inside the file, separate from every other, under a plain relative name that its own
    header repeats.

    Raises:
        CheckpointError: The zip is damaged or not strict. The message names the record if there is one.
    """
    count, start, end = _locate(mapping)
    found: list[tuple[int, str, int, int, bool]] = []  # header's place, name, size, checksum, plain
    at = start
    for _ in range(count):
        signature, _, _, flags, method, _, _, crc, packed, size, *lengths, _, _, _, header = _unpack(ENTRY, mapping, at)
        name_start, at = at + ENTRY.size, at + ENTRY.size + sum(lengths)
        name_end = name_start + lengths[0]
        if signature != b"PK\1\2" or at > end:
            raise CheckpointError("is a damaged zip file: its directory is not what it should be")
        name = _decode(mapping[name_start:name_end], flags)
        size, packed, header = _wide((size, packed, header), mapping[name_end : name_end + lengths[1]])
        if size or not name.endswith("/"):  # not a folder
            found.append((header, name, packed, crc, not flags & ENCRYPTED and not method and packed == size))
    if at != end:
        raise CheckpointError("is a damaged zip file: its directory is not what it should be")
    return _records(mapping, sorted(found), start)


def verify(mapping: mmap.mmap, record: Record, what: str) -> np.ndarray:
    """A record's bytes (uint8, a view), with their checksum compared.

    Raises:
        CheckpointError: The checksum differs. The message names `what`.
    """
    data = mapped_bytes(mapping, record.start, record.end)
    if record.crc and zlib.crc32(data.data) != record.crc:
        raise CheckpointError(f"{what} is damaged: its checksum differs (download or copy the file again)")
    return data


def _locate(mapping: mmap.mmap) -> tuple[int, int, int]:
    """The number of entries in the directory, and its bytes [start, end)."""
    place = mapping.rfind(b"PK\5\6", max(0, len(mapping) - END.size - 0xFFFF))
    if place < 0:
        raise CheckpointError("is a truncated zip file: its directory, which comes last, is missing")
    _, _, _, _, count, size, start, comment = _unpack(END, mapping, place)
    end = place
    if mapping[max(0, place - LOCATOR64.size) : place].startswith(b"PK\6\7"):
        _, _, end, _ = _unpack(LOCATOR64, mapping, place - LOCATOR64.size)
        signature, *_, count, size, start = _unpack(END64, mapping, end)
        if signature != b"PK\6\6":
            raise CheckpointError("is a damaged zip file: its directory is not what it should be")
    if start + size != end or place + END.size + comment != len(mapping):
        raise CheckpointError("is a damaged zip file: its directory is not where it should be")
    if count > RECORD_LIMIT:
        raise CheckpointError(f"has {count} records; accepted: up to {RECORD_LIMIT}")
    return count, start, end


def _records(mapping: mmap.mmap, found: list[tuple[int, str, int, int, bool]], limit: int) -> dict[str, Record]:
    records: dict[str, Record] = {}
    at = 0
    for header, name, size, crc, plain in found:
        if "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise CheckpointError(f"record {quoted(name)}: not a plain relative name")
        if name in records:
            raise CheckpointError(f"record {quoted(name)} is there twice")
        signature, _, flags, *_, name_length, extra_length = _unpack(LOCAL, mapping, header)
        name_end = header + LOCAL.size + name_length
        if signature != b"PK\3\4" or _decode(mapping[header + LOCAL.size : name_end], flags) != name:
            raise CheckpointError(f"record {quoted(name)}: its own header is damaged")
        start = name_end + extra_length
        if header < at or start + size > limit:
            raise CheckpointError(f"record {quoted(name)} overlaps another or the directory")
        at = start + size
        records[name] = Record(start, at, crc, plain)
    return records


def _unpack(layout: struct.Struct, mapping: mmap.mmap, at: int) -> tuple:
    if not 0 <= at <= len(mapping) - layout.size:
        raise CheckpointError("is a damaged zip file: a header lies outside the file")
    return layout.unpack_from(mapping, at)


def _decode(name: bytes, flags: int) -> str:
    try:
        return name.decode("utf-8" if flags & UTF8 else "cp437")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"record {name[:80]!r}: not a name in UTF-8") from error


def _wide(numbers: tuple[int, ...], extra: bytes) -> list[int]:
    """An entry's size, packed size and header's place, each from the zip64 extra field if it says so (4.5.3)."""
    wide: list[int] = []
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        body = extra[4 : 4 + length]
        if kind == 1:
            wide = list(struct.unpack_from(f"<{len(body) // 8}Q", body))
        extra = extra[4 + length :]
    if numbers.count(IN_EXTRA) > len(wide):
        raise CheckpointError("is a damaged zip file: a 64-bit size is missing")
    return [wide.pop(0) if n == IN_EXTRA else n for n in numbers]
