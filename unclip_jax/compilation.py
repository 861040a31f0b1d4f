"""The persistent compilation cache: a program compiled once is read back in later runs."""

import os
from pathlib import Path

import jax
import platformdirs


def use_compilation_cache() -> Path | None:
    """Turns on JAX's persistent cache in the user's cache folder, unless the user has configured one. Never raises.

    Returns:
        The folder; None if it cannot be written (read-only or full disk), in which case programs are compiled every
        time.
    """
    configured = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # made at run time
    if configured is not None:
        return Path(configured)
    folder = Path(platformdirs.user_cache_dir("unclip_jax")) / "compiled"
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
    except OSError:
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # The programs around the loop are many and small: together they are seconds.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return folder
