"""Small pictures, and tars of them, for the inputs of bulk jobs."""

import io
import tarfile

from PIL import Image


def png(level: int) -> bytes:
    """A gray picture."""
    data = io.BytesIO()
    Image.new("L", (4, 4), level).save(data, "PNG")
    return data.getvalue()


def tar(members: dict[str, bytes], mode: str = "w:") -> bytes:
    """A tar of files."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as made:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            made.addfile(info, io.BytesIO(content))
    return data.getvalue()
