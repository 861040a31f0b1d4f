"""One function, several implementations, chosen by the platform that a program is lowered for.

`jax.default_backend()` alone would be wrong: a process that sees a GPU also runs programs on its CPU (arrays placed
there, `jax.default_device`, ahead-of-time lowering), and the platform is known only when a program is lowered. The
choice is therefore made by `jax.lax.platform_dependent`, which traces every candidate and lowers one. Candidates for
accelerators that this process does not have are left out: tracing them costs seconds over a whole UNet, and some cannot
be traced without their device (JAX looks for cuDNN while it traces).
"""

from collections.abc import Callable
from typing import Any

import jax

Implementation = Callable[..., jax.Array]


def platform_of(device: Any) -> str:
    """What decides about a device's kernels.

    Args:
        device: A `jax.Device`.

    Returns:
        "gpu": NVIDIA's since Ampere (compute capability 8); "old-gpu": NVIDIA's before; "rocm"; "tpu": v4 and newer;
        "old-tpu": v2 and v3; "cpu" or a plug-in's name.
    """
    if device.platform == "gpu" and "rocm" in device.client.platform_version:
        return "rocm"
    if device.platform == "gpu":
        return "gpu" if int(device.compute_capability.split(".")[0]) >= 8 else "old-gpu"
    if device.platform == "tpu":
        return "old-tpu" if device.device_kind in ("TPU v2", "TPU v3") else "tpu"
    return str(device.platform)


def accelerator() -> str:
    """The best platform of this process, in the words of `platform_of`."""
    return platform_of(jax.devices()[0])


def by_platform(choose: Callable[[str], Implementation], *operands: Any) -> jax.Array:
    """`choose(platform)(*operands)`, for the platform that the surrounding program is lowered for.

    Args:
        choose: platform -> implementation. Equal choices must be the same object, so that no conditional is traced if
            there is nothing to choose.
        *operands: The implementation's arguments.

    Returns:
        The implementation's result.
    """
    on_cpu, best = choose("cpu"), choose(accelerator())
    if on_cpu is best or accelerator() == "cpu":
        return on_cpu(*operands)
    return jax.lax.platform_dependent(*operands, cpu=on_cpu, default=best)
