"""The inputs of bulk jobs, read as streams: folders of pictures, tables, webdataset's tars, standard input.

A row costs no memory once it is handed on. Pictures are not read here, see `unclip_jax.bulk.rows`.
"""

import io
import itertools
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from unclip_jax.bulk import files
from unclip_jax.bulk.rows import ARRAY_FILE, ARRAYS, PICTURES, Base, Row, Stored, argument_names, make_row
from unclip_jax.conditioning.address import is_address, shown
from unclip_jax.dataset_files import SUFFIXES, Member, csv_rows, json_lines, sample_columns, tar_members

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
TABLES = (".jsonl", ".csv", ".parquet")
PARQUET_ROWS = 256  # held at a time: their pictures may be in them
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
STDIN = "-"

# (which row it is, for messages; its columns)
Columns = Iterator[tuple[str, Mapping[str, Any]]]


def read_rows(
    source: str | os.PathLike[str],
    arguments: type,
    *,
    names: Mapping[str, str] | None = None,
    stdin: TextIO | None = None,
) -> Iterator[Row]:
    """The rows of an input, one by one.

    Columns are arguments of the call by their names; `file_name` is `image`, and `text` or `caption` is `prompt`, where
    there is no column of that name. The other columns are carried along. Pictures are paths, addresses, lists of them
    to mix, or bytes in parquet; arrays are lists of numbers or `.npy` files. Relative file names begin from the input's
    folder, and from the current one for standard input. Those of folders and of tables at an address may not leave it.

    Args:
        source: A folder in Hugging Face's `imagefolder` convention: `metadata.jsonl`, `metadata.csv` or
            `metadata.parquet` with `file_name`, or else all pictures in it and below, in the order of their names. Or
            a `.jsonl`, `.csv` or `.parquet` file, or a `.tar` of webdataset, with the members of a sample side by side:
            `0001.jpg` is its image, `0001.mask_image.png` and `0001.latents.npy` are arguments by name, `0001.txt` is
            its prompt and `0001.json` has columns. Files may be several, by `{00..07}` or `*`. Or `-`: JSON lines from
            standard input. Local, or at any address of fsspec.
        arguments: The class of the call's arguments, of `unclip_jax.pipelines.arguments`.
        names: Column -> what to call it instead: `{"text_en": "prompt"}`.
        stdin: Standard input.

    Returns:
        An iterator of rows.

    Raises:
        FileNotFoundError: There is no such input.
        ValueError: It is of another kind, or empty; a line is broken; a column is a setting of the job; a file name
            points outside. The message names the file and the line. All but the first are raised on the way.
        ModuleNotFoundError: A package is missing. The message says which.
        OSError: The input cannot be read.
    """
    if source == STDIN:
        read = [(_objects(json_lines(stdin or sys.stdin, "standard input")), Base(os.getcwd(), inside=False))]
        return _rows("standard input", iter(read), arguments, names or {})
    place = files.absolute(source)
    if place.lower().endswith((*TABLES, ".tar")) and not os.path.isdir(place):
        return _rows(shown(place), map(_file, _several(place)), arguments, names or {})
    if not files.is_folder(place):
        if not is_address(place) and not os.path.exists(place):
            raise FileNotFoundError(f"{place}: no such folder or file")
        raise ValueError(f"{shown(place)}: want a folder, or a {', '.join(TABLES)} or .tar file")
    return _rows(shown(place), iter([_folder(place)]), arguments, names or {})


def _rows(
    source: str, read: Iterator[tuple[Columns, Base]], arguments: type, names: Mapping[str, str]
) -> Iterator[Row]:
    own = argument_names(arguments)
    numbers = itertools.count()
    for columns, base in read:
        for where, row in columns:
            yield make_row(next(numbers), row, where, own, names, base)
    if not next(numbers):
        raise ValueError(f"{source}: holds no rows")


def _several(pattern: str) -> list[str]:
    """The files that a pattern means: with `{00..07}` in it, then `*`, `?` or `[...]`, unless it is a file's name.

    Raises:
        FileNotFoundError: There is none.
    """
    if not is_address(pattern) and os.path.isfile(pattern):
        return [pattern]
    if found := RANGE.search(pattern):
        first, last = found.groups()
        each = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
        return [place for text in each for place in _several(pattern[: found.start()] + text + pattern[found.end() :])]
    if re.search(r"[*?\[]", pattern) and (places := files.matching(pattern)):
        return places
    if is_address(pattern):  # its absence shows when it is opened
        return [pattern]
    raise FileNotFoundError(f"{pattern}: no such file")


def _file(place: str) -> tuple[Columns, Base]:
    base = Base(files.folder_of(place), inside=is_address(place))
    return _tar(place) if place.lower().endswith(".tar") else _table(place), base


def _folder(place: str) -> tuple[Columns, Base]:
    base = Base(place, inside=True)
    found = [name for name in METADATA if files.exists(files.joined(place, name))]
    if len(found) > 1:
        raise ValueError(f"{shown(place)}: has {' and '.join(found)}; want one of them")
    if found:
        return _table(files.joined(place, found[0])), base
    return ((name, {"file_name": name}) for name in pictures_below(place)), base


def pictures_below(folder: str, path: str = "") -> Iterator[str]:
    """The pictures in a folder and below, in the order of their paths' parts; the names of one folder are held at once.

    Args:
        folder: The place of the folder.
        path: Where in it to begin.

    Yields:
        Paths from the folder.

    Raises:
        OSError: A folder cannot be listed.
    """
    for name, is_folder in sorted(files.entries(files.joined(folder, path) if path else folder)):
        below = f"{path}/{name}" if path else name
        if is_folder:
            yield from pictures_below(folder, below)
        elif os.path.splitext(name)[1].lower() in SUFFIXES:
            yield below


def _table(place: str) -> Columns:
    name = _last(place)
    if place.lower().endswith(".parquet"):
        yield from _parquet(place, name)
        return
    # "utf-8-sig": spreadsheets begin with a mark
    with files.open_file(place) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
        lines = place.lower().endswith(".jsonl")
        yield from _objects(json_lines(file, name)) if lines else _cells(csv_rows(file, name))


def _objects(lines: Iterator[tuple[str, Any]]) -> Columns:
    for where, value in lines:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: want an object")
        yield where, value


def _cells(rows: Iterator[tuple[str, dict[Any, Any]]]) -> Columns:
    for where, row in rows:
        if None in row:
            raise ValueError(f"{where}: has more cells than there are columns")
        yield where, {name: text for name, text in row.items() if text}


def _parquet(place: str, name: str) -> Columns:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ModuleNotFoundError(f"{name}: parquet needs pyarrow: pip install 'unclip-jax[bulk]'") from error
    number = 0
    with files.open_file(place) as raw:
        try:
            for batch in pyarrow.parquet.ParquetFile(raw).iter_batches(PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name}, row {number}", row
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise files.like(error, f"{name}: not parquet, or broken after row {number}: {error}") from error


def _tar(place: str) -> Columns:
    name = _last(place)
    with files.open_file(place) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        for key, found in itertools.groupby(tar_members(file, size, name), lambda each: each[0]):
            members = {suffix: member for _, suffix, member in found}
            columns = sample_columns(file, name, members)
            for argument, member in _arguments(members).items():
                columns[argument] = Stored(place, (member.offset, member.size), f"{name}: {member.name}")
            if columns:
                yield f"{name}: {key}", {"__key__": key, **columns}


def _arguments(members: Mapping[str, Member]) -> dict[str, Member]:
    """Argument -> member: the picture of a sample, and what is named after an argument, `.mask_image.png`."""
    pictures = [members[suffix] for suffix in SUFFIXES if suffix in members]
    found = {"image": pictures[0]} if pictures else {}
    for suffix, member in members.items():
        argument, _, kind = suffix[1:].partition(".")
        kinds = (*SUFFIXES, ARRAY_FILE) if argument in PICTURES else (ARRAY_FILE,) if argument in ARRAYS else ()
        if f".{kind}" in kinds:
            found[argument] = member
    return found


def _last(place: str) -> str:
    return shown(place).rpartition("/")[2]
