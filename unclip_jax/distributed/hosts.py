"""Several hosts: processes that join into one JAX runtime, and what they tell one another outside of programs."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# Seconds without a sign of life after which a process counts as dead, and JAX ends all others.
HEARTBEAT = 60


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat: int = HEARTBEAT,
) -> None:
    """Joins this process with those of other hosts, so that `jax.devices()` are the devices of all.

    Call it in every process before anything else of JAX; a second call does nothing. Without arguments JAX finds the
    others itself: on Cloud TPU, under SLURM and Open MPI, and on Kubernetes (which needs `jax[k8s]`). It waits for all
    of them for five minutes.

    When a process dies, JAX ends the others (SIGABRT) `heartbeat` seconds later, with a message that names it. When one
    ends by an exception, the others are ended as it leaves, after five minutes at most.

    Args:
        coordinator: "host:port" of the process 0, a free port there.
        num_processes: How many processes join.
        process_id: Which of them this is, from 0.
        heartbeat: Seconds without a sign of life after which a process counts as dead.

    Raises:
        ValueError: Some of the first three are given and others are not, or none is and JAX finds no cluster.
        RuntimeError: JAX has devices already.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if coordinator is not None and num_processes is not None and process_id is not None:
        if not 0 <= process_id < num_processes:
            raise ValueError(f"process_id is {process_id}; want 0 to {num_processes - 1}")
        if not coordinator.rpartition(":")[2].isdecimal():
            raise ValueError(f"coordinator is {coordinator!r}; want host:port")
    elif len(missing) < len(given):
        raise ValueError(f"{', '.join(missing)} missing; give coordinator, num_processes and process_id, or none")
    if jax.distributed.is_initialized():
        return
    # It would keep SIGTERM from ending a process, for programs that ask it what to do. orbax does without.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=heartbeat)
    except ValueError as error:
        if len(missing) < len(given):
            raise
        raise ValueError(
            "JAX finds no cluster here; give coordinator (host:port), num_processes and process_id"
        ) from error


def each(value: Any) -> list[Any]:
    """A value of JSON types of every process, in their order. All processes have to call it, and wait for the last."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.process_allgather(np.int32(len(text))).max())
    rows = multihost_utils.process_allgather(np.pad(text, (0, size - len(text)), constant_values=ord(" ")))
    return [json.loads(row.tobytes()) for row in rows]


def once(make: Callable[[], Any]) -> Any:
    """What a function gives, of JSON types, that is called in the first process alone; the others wait for it."""
    return each(make() if jax.process_index() == 0 else None)[0]
