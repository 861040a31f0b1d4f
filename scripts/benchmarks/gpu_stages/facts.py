"""What the machine is, and its two ceilings: bytes and products a second."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gpu_stages.run import Add, Run, times

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "torch", "diffusers")
LIBRARIES = ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "nvidia-cublas", "nvidia-cublas-cu12")


def measure(run: Run, add: Add) -> None:
    device = jax.devices()[0]
    add({"what": "platform", "value": device.platform})
    add({"what": "device", "value": device.device_kind})
    add({"what": "compute capability", "value": getattr(device, "compute_capability", "none")})
    add({"what": "host", "value": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"})
    if smi := shutil.which("nvidia-smi"):
        command = [smi, "--query-gpu=driver_version,memory.total,power.limit", "--format=csv,noheader"]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=10)
        add({"what": "driver, memory, power limit", "value": asked.stdout.strip()})
    for name in (*PACKAGES, *LIBRARIES):
        try:
            add({"what": name, "value": importlib.metadata.version(name)})
        except importlib.metadata.PackageNotFoundError:
            continue
    for name in ("XLA_FLAGS", "XLA_CLIENT_MEM_FRACTION"):
        if name in os.environ:
            add({"what": name, "value": os.environ[name]})
    add({"what": "copy, GB/s", "value": copy_speed(run), "predicted": 4300 if run.full_size else None})
    add({"what": f"products, TFLOP/s, {run.dtype}", "value": product_speed(run), "predicted": 790})


def copy_speed(run: Run) -> float:
    """GB/s, read and written together."""
    x = jnp.ones(2**29 if run.full_size else 2**22, jnp.bfloat16)
    return 2 * x.nbytes / milliseconds(run, lambda x: x + 1, x) / 1e6


def product_speed(run: Run) -> float:
    """TFLOP/s of a large product of random numbers: of zeros it would need less power, and be faster."""
    side = run.scaled(8192, 128)
    a, b = (jax.random.normal(jax.random.key(seed), (side, side), jnp.dtype(run.dtype)) for seed in (0, 1))
    return 2 * side**3 / milliseconds(run, lambda a, b: a @ b, a, b) / 1e9


def milliseconds(run: Run, function: Callable[..., jax.Array], *given: jax.Array) -> float:
    """Of a call, compiled."""
    compiled = jax.jit(function)

    def way() -> None:
        jax.block_until_ready([compiled(*given) for _ in range(run.calls)])

    return times({"way": way}, run.rounds, run.calls)["way"]["ms"]
