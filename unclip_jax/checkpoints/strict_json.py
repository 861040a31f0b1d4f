"""Strict reading of JSON that came with a checkpoint: bounded in size and depth, UTF-8, no key twice in an object."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

LIMIT = 2**24  # bytes; a tokenizer, the largest that is published, has 4 MB; parsing takes some 25 times as much


def parse_json(raw: bytes) -> Any:
    """Parses any JSON value.

    Raises:
        ValueError: It is too large, too deep, repeats a key, or is not valid JSON.
    """
    if len(raw) > LIMIT:
        raise ValueError(f"{len(raw)} bytes of JSON; accepted: up to {LIMIT}")
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_object)
    except _Twice as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"is not valid JSON ({error})") from error


def where(path: Path) -> str:
    """What messages call a file of a folder."""
    return f"{path.parent.name}/{path.name}"


def read_bytes(path: Path) -> bytes:
    """The contents of a small file.

    Raises:
        ValueError: It is missing, too large, or not a file. The message names it.
    """
    if not path.is_file():  # never open a pipe or a device: it may block
        raise ValueError(f"{where(path)}: missing, or not a file")
    with path.open("rb") as file:
        raw = file.read(LIMIT + 1)
    if len(raw) > LIMIT:
        raise ValueError(f"{where(path)}: more than {LIMIT} bytes")
    return raw


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: It does not hold a JSON object. The message names the file.
    """
    raw = read_bytes(path)
    try:
        data = parse_json(raw)
    except ValueError as error:
        raise ValueError(f"{where(path)}: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{where(path)} holds a {type(data).__name__}; want a JSON object")
    return data


class _Twice(Exception):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise _Twice(f"{twice[:120]!r} is there twice")
    return made
