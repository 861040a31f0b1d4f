"""The files of data sets, as streams: JSON lines, CSV, the samples of webdataset's tars.

Training and bulk jobs read them. What a column means is theirs to say, but not why something cannot be read.
"""

import csv
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_TEXT_BYTES = 1 << 20


class Member(NamedTuple):
    """A file in a tar: its name, and where its bytes are."""

    name: str
    offset: int
    size: int


def reason(error: Exception) -> str:
    """Why something could not be read, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def json_lines(lines: Iterable[str], name: str) -> Iterator[tuple[str, Any]]:
    """The values of a file of JSON, one a line; empty lines are left out.

    Args:
        lines: The file.
        name: What messages call it.

    Yields:
        (which line it is, for messages; its value).

    Raises:
        ValueError: A line is not JSON, or not UTF-8. The message names file and line.
    """
    for number, line in _decoded(lines, name):
        if line.strip():
            where = f"{name}, line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON: {error}") from error


def csv_rows(lines: Iterable[str], name: str) -> Iterator[tuple[str, dict[Any, Any]]]:
    """The rows of a CSV file whose first line names the columns; all values are strings.

    Args:
        lines: The file, opened with `newline=""`.
        name: What messages call it.

    Yields:
        (which line it is, for messages; its columns). Cells without a column are a list under None.

    Raises:
        ValueError: It is not CSV, or not UTF-8. The message names file and line.
    """
    reader = csv.DictReader(line for _, line in _decoded(lines, name))
    try:
        for row in reader:
            yield f"{name}, line {reader.line_num}", row
    except csv.Error as error:
        raise ValueError(f"{name}, after line {reader.line_num}: not CSV: {error}") from error


def _decoded(lines: Iterable[str], name: str) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        for line in lines:
            number += 1
            yield number, line
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}, after line {number}: not UTF-8: {error}") from error


def points_outside(name: str) -> bool:
    """Whether a path that should be within a folder is not."""
    return name.startswith("/") or ".." in name.split("/")  # much faster than by pathlib


def tar_members(file: BinaryIO, size: int, name: str) -> Iterator[tuple[str, str, Member]]:
    """The files of a tar, from its headers alone.

    Args:
        file: The tar. Others may seek in it between two members.
        size: Its bytes.
        name: What messages call it.

    Yields:
        (key, suffix, member): members of one key are one sample, `a/0001.jpg` and `a/0001.txt`. The key ends at the
        first point of the last part, as webdataset has it: "a.b/0001.seg.png". The suffix begins with a point and is
        in lower case.

    Raises:
        ValueError: The tar is broken or compressed (its members cannot be found without unpacking all).
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined] # it keeps all headers otherwise
                folder, _, last = member.name.rpartition("/")
                stem, point, suffix = last.partition(".")
                if member.isreg() and stem and point:
                    found = Member(member.name, member.offset_data, member.size)
                    yield f"{folder}/{stem}".removeprefix("/"), f".{suffix.lower()}", found
            if size - tar.offset < tarfile.BLOCKSIZE:  # of zeros, after the last member
                raise tarfile.ReadError("cut off")
    except tarfile.TarError as error:
        raise ValueError(f"{name}: not an uncompressed tar: {error}") from error


def sample_columns(file: BinaryIO, name: str, members: Mapping[str, Member]) -> dict[str, Any]:
    """What a sample of a tar says in words: the object in its `.json`, with its `.txt`, stripped, as "text".

    Args:
        file: The tar.
        name: What messages call it.
        members: Suffix -> member of the sample.

    Returns:
        The columns.

    Raises:
        ValueError: A member is larger than 1 MiB, or is not what its suffix says. The message names both.
    """

    def read(suffix: str) -> str:
        member = members[suffix]
        if member.size > MAX_TEXT_BYTES:
            raise ValueError(f"{name}: {member.name} has {member.size} bytes; want at most {MAX_TEXT_BYTES}")
        file.seek(member.offset)
        try:
            return file.read(member.size).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: {member.name}: {error}") from error

    columns: dict[str, Any] = {}
    if ".json" in members:
        try:
            columns = json.loads(read(".json"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}: {members['.json'].name}: not JSON: {error}") from error
        if not isinstance(columns, dict):
            raise ValueError(f"{name}: {members['.json'].name}: want an object")
    return columns | {"text": read(".txt").strip()} if ".txt" in members else columns
