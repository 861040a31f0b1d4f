"""What is made of a row, as files: pictures, arrays, tars in webdataset's manner. Equal values make equal bytes."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from unclip_jax.bulk.job import Format
from unclip_jax.image_files import png_bytes

SUFFIXES: dict[Format, str] = {
    "png": ".png",
    "jpeg": ".jpg",
    "webp": ".webp",
    "latents": ".latents.npy",
    "image_embeds": ".image_embeds.npy",
}
QUALITY = 95


def file_name(save: Format, row: int, image: int) -> str:
    """The name of the file of a row's image, in the folder or the tar of its part."""
    return f"{row:09d}-{image}{SUFFIXES[save]}"


def encoded(save: Format, value: Any, recipe: Mapping[str, Any]) -> bytes:
    """The file of a picture or an array. A PNG has its recipe in it."""
    if save == "png":
        return png_bytes(value, recipe)
    file = io.BytesIO()
    if save in ("jpeg", "webp"):
        picture: Image.Image = value
        picture.save(file, format=save.upper(), quality=QUALITY)
    else:
        np.save(file, np.asarray(value, np.float32), allow_pickle=False)
    return file.getvalue()


def tar(samples: Iterable[tuple[str, bytes, Mapping[str, Any]]]) -> bytes:
    """A tar of samples (name of the file, its bytes, its record), in their order, each with a `.json` of its record."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:", format=tarfile.USTAR_FORMAT) as archive:
        for name, data, record in samples:
            # webdataset's key ends at the first point.
            described = json.dumps(record, ensure_ascii=False, sort_keys=True).encode()
            for member, content in ((name, data), (f"{name.partition('.')[0]}.json", described)):
                info = tarfile.TarInfo(member)  # owner and time are zero
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return file.getvalue()
