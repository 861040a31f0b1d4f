"""The rows of a bulk job's input: which columns are arguments of the call, and what is read for them."""

import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np

from unclip_jax.bulk import files
from unclip_jax.conditioning.address import is_address, shown
from unclip_jax.dataset_files import points_outside

PICTURES = {"image", "mask_image", "depth_map", "condition_image", "control_image"}
ARRAYS = {
    *("image_embeds", "image_weights", "image_noise", "prompt_embeds", "negative_prompt_embeds", "latents", "noise"),
    *("posterior_noise", "low_res_noise", "prior_latents", "prior_step_noise"),
}
TEXTS = {"prompt", "negative_prompt"}
# One value for all rows, or no value that a table could hold.
OF_THE_JOB = {
    *("batch_size", "output_type", "num_images_per_prompt", "scheduler", "step_noise", "projected_guidance"),
    *("text_features", "negative_text_features", "controlnet"),
}
# What data sets call arguments, where they have no column of the argument's name.
ALIASES = (("file_name", "image"), ("text", "prompt"), ("caption", "prompt"))
ARRAY_FILE = ".npy"


class Stored(NamedTuple):
    """A picture or an array that is not read yet.

    Attributes:
        place: The file: an absolute path, an address or a data URI.
        part: (offset, bytes) in it; None for all of it.
        name: As the input has it. Of an address it may hold a secret; `unclip_jax.conditioning.address.shown` does not.
    """

    place: str
    part: tuple[int, int] | None
    name: str

    def read(self) -> bytes:
        """The bytes. Raises OSError where they cannot be read; ValueError, for what `fetch` refuses."""
        return files.read_file(self.place, self.part)


class Row(NamedTuple):
    """A row of an input.

    Attributes:
        number: From 0, in the input's order.
        values: Argument of the call -> string, number, list, bytes, or `Stored`.
        others: The columns that are no argument.
    """

    number: int
    values: dict[str, Any]
    others: dict[str, Any]


class Base(NamedTuple):
    """Where the file names of an input are.

    Attributes:
        folder: What relative names begin from.
        inside: Whether they may not leave it.
    """

    folder: str
    inside: bool


def argument_names(arguments: type) -> set[str]:
    """The arguments of a call that may be columns.

    Args:
        arguments: A class of `unclip_jax.pipelines.arguments`.
    """
    return {field.name for field in fields(arguments)} - OF_THE_JOB


def make_row(
    number: int, columns: Mapping[str, Any], where: str, arguments: set[str], names: Mapping[str, str], base: Base
) -> Row:
    """A row of the columns of an input. What is empty (null, an empty cell) is left out.

    Args:
        number: The row's.
        columns: Name -> value.
        where: What messages call the row.
        arguments: As from `argument_names`.
        names: Column -> what to call it instead; a column that has the new name is left out.
        base: Where file names are.

    Returns:
        The row.

    Raises:
        ValueError: A column is a setting of the job, or a file name points outside the folder.
    """
    if names:
        renamed = {new: columns[name] for name, new in names.items() if name in columns}
        columns = {**renamed, **{name: v for name, v in columns.items() if name not in names and name not in renamed}}
    values: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for name, value in columns.items():
        if value is None:
            continue
        if name in arguments:
            values[name] = _given(name, value, where, base)
        elif name in OF_THE_JOB:
            raise ValueError(f"{where}: column {name} is a setting of the whole job; leave it out, or rename it")
        elif not _is_file(value):  # which no manifest should repeat
            others[name] = value
    for name, argument in ALIASES if others else ():
        if name in others and argument in arguments and argument not in values:
            values[argument] = _given(argument, others.pop(name), where, base)
    return Row(number, values, others)


def resolve(row: Row) -> dict[str, Any]:
    """The arguments of a call: pictures as the bytes of their files, arrays as numpy arrays.

    Lists of numbers become float32, `.npy` files keep their dtype, and no shape is changed. Where a picture is a `.npy`
    file it is an array too.

    Args:
        row: The row.

    Returns:
        Argument -> value.

    Raises:
        ValueError: A value is of another kind, or a file is no `.npy` file. The message names row and column.
        OSError: A file cannot be read; FileNotFoundError, where there is none.
    """
    made = {}
    for name, value in row.values.items():
        try:
            made[name] = _picture(value) if name in PICTURES else _array(value) if name in ARRAYS else value
        except (OSError, ValueError) as error:
            raise files.like(error, f"row {row.number}: {name}: {error}") from error
    return made


def fingerprint(row: Row) -> str:
    """SHA-256 of what a row says, the same in every process and on every machine.

    Of files it has the names, as the input has them, and the bytes' count where that takes no question to a server: for
    local ones and parts of a tar. What is in them is not read.

    Args:
        row: The row.

    Returns:
        64 hexadecimal digits.
    """
    said = [row.number, _said(row.values), _said(row.others)]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def _given(name: str, value: Any, where: str, base: Base) -> Any:
    """An argument's value. What cannot be one stays as it is: only its own row is refused, when it is made."""
    if name in PICTURES:
        if isinstance(value, dict):  # an image of Hugging Face's parquet files
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, list):
            return [_given(name, each, where, base) for each in value]
    if not isinstance(value, str) or name in TEXTS:
        return value
    if name in PICTURES or (name in ARRAYS and not value.startswith("[")):
        return _stored(value, where, base)
    return _parsed(value)


def _parsed(text: str) -> Any:
    """A cell of a CSV file: a number, a truth (True, too) or a list, else as it is."""
    try:
        return json.loads(text.lower())
    except (ValueError, RecursionError):
        return text


def _stored(name: str, where: str, base: Base) -> Stored:
    remote = ":" in name and is_address(name)
    # "local" and chains of fsspec lead to local files, too
    leaves = name.lower().startswith(("file:", "local:")) if remote else points_outside(name)
    if base.inside and (leaves or ("::" in name and name[:5].lower() != "data:")):
        raise ValueError(f"{where}: {shown(name)!r} points outside the folder")
    if not remote:
        return Stored(files.joined(base.folder, name), None, name)
    return Stored(files.absolute(name) if leaves else name, None, name)


def _picture(value: Any) -> Any:
    if isinstance(value, list):
        return [_picture(each) for each in value]
    if isinstance(value, bytes):
        return value
    if not isinstance(value, Stored):
        raise ValueError(f"is {value!r:.80}; want a path, an address or a list of them")
    return _npy(value) if value.name.lower().endswith(ARRAY_FILE) else _read(value)


def _array(value: Any) -> np.ndarray:
    if isinstance(value, Stored):
        return _npy(value)
    try:
        return np.asarray(value, np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"is {value!r:.80}; want numbers, in lists of equal lengths, or a .npy file") from error


def _npy(value: Stored) -> np.ndarray:
    data = _read(value)
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError, OverflowError) as error:
        raise ValueError(f"{shown(value.name)}: not a .npy file: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{shown(value.name)}: a .npz file; want a .npy file")
    return array


def _read(value: Stored) -> bytes:
    try:
        return value.read()
    except FileNotFoundError:
        raise FileNotFoundError(f"{shown(value.name)}: no such file") from None


def _is_file(value: Any) -> bool:
    return isinstance(value, bytes | Stored) or (isinstance(value, dict) and "bytes" in value)


def _said(value: Any) -> Any:
    if isinstance(value, Stored):
        return {"file": value.name, "bytes": value.part[1] if value.part else _local_size(value.place)}
    if isinstance(value, bytes):
        return {"sha256": hashlib.sha256(value).hexdigest()}
    if isinstance(value, dict):
        return {str(name): _said(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_said(each) for each in value]
    return value


def _local_size(place: str) -> int | None:
    try:
        return None if is_address(place) else os.stat(place).st_size
    except (OSError, ValueError):  # a zero in the name
        return None
