"""What a checkpoint is called, for kinds that nothing but a name tells."""

from pathlib import Path
from typing import Any


def names_of(path: Path, origin: Any = None) -> list[str]:
    """The names of a file or folder.

    Args:
        path: The file or folder. In the hub's cache the repository's name counts for a whole snapshot.
        origin: `_name_or_path` of a folder's model_index.json, which names what the pipeline was loaded from.
    """
    path = path.absolute()
    names = [path.name, str(origin).rpartition("/")[2] if isinstance(origin, str) else ""]
    if path.is_dir() and path.parent.name == "snapshots":
        names.append(path.parent.parent.name.rpartition("--")[2])
    return names
