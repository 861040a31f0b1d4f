"""How programs of tests are compiled, and kept by a run of the tests for the next in the folder UNCLIP_JAX_TEST_CACHE.

JAX's own lock is for one entry at a time and is waited for in vain when many processes write, and a process that is
killed while it writes leaves an entry that is refused ever after. So one run has the folder, and sweeps it first.
"""

from pathlib import Path
from typing import Any

import jax
from filelock import FileLock, Timeout
from jax._src import compiler

_OPTIONS = compiler.get_compile_options


def compile_fast(fast: bool) -> None:
    """Whether programs are compiled quickly, as they are small and run a few times, or optimised as users have them.

    It is most of the work of the tests. Without optimisations it takes half of the time, and without XLA's newer way
    of generating fused loops, which releases from 0.11 on have alone, two thirds of that. (The optimiser takes twice
    as long over what the older way makes, so the option is no good for all programs, as XLA_FLAGS would have it; JAX
    has no setting of it.)
    """
    jax.config.update("jax_disable_most_optimizations", fast)
    if jax.__version_info__ >= (0, 11):
        return

    def options(*args: Any, **kw: Any) -> Any:
        made = _OPTIONS(*args, **kw)
        made.env_option_overrides = [*made.env_option_overrides, ("xla_cpu_use_fusion_emitters", False)]
        return made

    compiler.get_compile_options = options if fast else _OPTIONS


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
