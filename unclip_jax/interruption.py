"""Terminating a program from outside."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def termination_interrupts() -> Iterator[None]:
    """Within the block, SIGTERM (from batch systems and containers) raises KeyboardInterrupt, as Ctrl-C does.

    Unfinished work is then cleaned up. Has no effect outside the main thread, where Python allows no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
