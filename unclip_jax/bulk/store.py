"""A folder that a bulk job writes to, local or at any address that fsspec knows."""

import contextlib
import os
from dataclasses import dataclass

from unclip_jax.bulk import files
from unclip_jax.checkpoints.atomic import remove_abandoned
from unclip_jax.conditioning.address import is_address
from unclip_jax.dataset_files import points_outside


@dataclass(frozen=True)
class Store:
    """A folder. Names are paths within it, with `/`; it can be sent to other processes.

    Attributes:
        address: An absolute path, or an address.
    """

    address: str

    def read(self, name: str) -> bytes:
        """The bytes of a file. Raises FileNotFoundError where there is none, OSError where it cannot be read."""
        return files.read_file(self._place(name))

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, whole or not at all, in the place of one that is there. Raises OSError where it cannot."""
        files.write_file(self._place(name), data)

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name. Raises OSError where the store does not say."""
        return files.exists(self._place(name))

    def names(self, folder: str = "") -> list[str]:
        """The names of the files in a folder, not of those below it, sorted; none where there is no such folder.

        Those that begin with a point are left out: temporary files are among them. Raises OSError where the store does
        not say.
        """
        try:
            found = files.entries(self._place(folder) if folder else self.address)
        except FileNotFoundError:
            return []
        prefix = f"{folder.removesuffix('/')}/" if folder else ""
        return sorted(prefix + entry.name for entry in found if not entry.is_folder and not entry.name.startswith("."))

    def remove(self, name: str) -> None:
        """Removes a file, if there is one. Raises OSError where it cannot."""
        files.remove_file(self._place(name))

    def remove_folder(self, name: str) -> None:
        """Removes a folder if it is empty. Object stores have no empty ones."""
        if not is_address(self.address):
            with contextlib.suppress(OSError):
                os.rmdir(self._place(name))

    def remove_leftovers(self, folder: str = "", beginning: str = "") -> None:
        """Removes the temporary files of killed writes in a folder, not below it. Object stores have none.

        beginning: of the names that were to be written. Nobody else may write such files there meanwhile.
        """
        if not is_address(self.address):
            remove_abandoned(self._place(folder) if folder else self.address, beginning)

    def _place(self, name: str) -> str:
        if not name or points_outside(name) or "::" in name or "://" in name:
            raise ValueError(f"name is {name!r}; want a path within {self.address}")
        return files.joined(self.address, name)


def open_store(address: str | os.PathLike[str]) -> Store:
    """A folder to read and write, which need not be there yet.

    Args:
        address: A path, or an address that fsspec knows: `gs://bucket/folder`, `s3://...`, `memory://...`.

    Returns:
        The folder.

    Raises:
        ValueError: It is an address of an unknown kind, or a file.
        ModuleNotFoundError: fsspec, or the package of this kind of address, is missing. The message says which.
    """
    place = files.absolute(address)
    if os.path.isfile(place):
        raise ValueError(f"{place}: a file; want a folder")
    return Store(place)
