"""Compiled programs that a run of the tests leaves for the next, in the folder UNCLIP_JAX_TEST_CACHE.

JAX's own lock is for one entry at a time and is waited for in vain when many processes write, and a process that is
killed while it writes leaves an entry that is refused ever after. So one run has the folder, and sweeps it first.
"""

from pathlib import Path

from filelock import FileLock, Timeout


def take(folder: Path) -> FileLock | None:
    """The lock on a folder of programs, held; None where another run holds it. Half-written entries are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".run")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    kinds = ("cache", "atime")  # a program, and when it was last used, which is written after it
    keys = [{path.name.removesuffix(f"-{kind}") for path in folder.glob(f"*-{kind}")} for kind in kinds]
    for key in keys[0] ^ keys[1]:
        for kind in kinds:
            (folder / f"{key}-{kind}").unlink(missing_ok=True)
    return lock
