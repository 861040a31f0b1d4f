"""The persistent compilation cache: a program compiled once is read back in later runs."""

import contextlib
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import platformdirs
from jax.sharding import Mesh

# What the folder may hold: programs of a few networks at a few sizes. The least recently used go first.
MAX_BYTES = 8 * 2**30


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
        _remove_unfinished(folder)
    except OSError:
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    # JAX's partitioned attention for NVIDIA GPUs has an address of this process in its program.
    jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
    # The programs around the loop are many and small: together they are seconds.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.01)
    return folder


def _remove_unfinished(folder: Path) -> None:
    """Removes programs without a time of use: while there is one, JAX cannot tell which to drop, and writes none."""
    for program in folder.glob("*-cache"):
        if not program.with_name(f"{program.name.removesuffix('-cache')}-atime").exists():
            with contextlib.suppress(FileNotFoundError):  # another process does the same
                program.unlink()


def compiler_options(
    mesh: Mesh, dtype: Any = np.float32, *, tower: bool = False, sharded: bool = False
) -> dict[str, str]:
    """What `jax.jit` tells the compiler of a program that runs a network on these devices in this dtype.

    On a CPU in float32, matrix products and convolutions are left to Eigen. By XLA's other library, YNNPACK, those of
    the UNet take a sixth more time on 2 cores of a Zen 3, and the gradients of kernels up to twice as much. A CLIP
    tower's have so few rows that YNNPACK is as fast (257 tokens) or a quarter faster (154), and keeps them. (jaxlib
    0.10.1)

    Where weights are `sharded`, a CPU's operations are ordered for memory instead of for concurrency: that order would
    gather all weights before the first layer. Of accelerators it is the only order.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    eigen = on_cpu and np.dtype(dtype) == np.float32 and not tower
    options = {"xla_cpu_experimental_ynn_fusion_type": ""} if eigen else {}
    return options | ({"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if on_cpu and sharded else {})
