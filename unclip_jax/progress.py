"""Progress of long work: a bar on a terminal or in a notebook, plain lines elsewhere."""

import datetime
import sys
import time
from types import TracebackType
from typing import Any

# Work shorter than this is not worth a line.
QUIET_SECONDS = 2.0
NOTE_SECONDS = 30.0
LONGEST_LINE = 2000


class Progress:
    """A stage of work with a known amount; a context manager. `update` advances it, `stage` renames it.

    Args:
        description: The stage's name.
        total: The amount of work; None: it is not known.
        unit: What is counted.
        enabled: False shows nothing.
        bytes_: The amount is in bytes.
    """

    def __init__(self, description: str, total: int | None, *, unit: str, enabled: bool = True, bytes_: bool = False):
        self.description = description
        self.enabled = enabled
        self.started = time.monotonic()
        self.noted = self.started
        self.done, self.total, self.unit = 0, total, unit
        interactive = enabled and _interactive()
        scale: dict[str, Any] = {"unit_scale": True, "unit_divisor": 1024} if bytes_ else {}
        self.bar: Any = None
        if interactive:
            from tqdm.auto import tqdm  # here, since every command pays for it, also the one that shows no bar

            self.bar = tqdm(total=total, desc=description, unit=unit, leave=False, delay=0.5, **scale)

    def update(self, amount: int = 1) -> None:
        self.done += amount
        if self.bar is not None:
            self.bar.update(amount)

    def expect(self, total: int) -> None:
        """The amount has become known."""
        self.total = total
        if self.bar is not None:
            self.bar.total = total
            self.bar.refresh()

    def stage(self, description: str) -> None:
        self.description = description
        if self.bar is not None:
            self.bar.set_description(description)

    def note(self, text: str) -> None:
        """Shows a note: beside the bar, or on a line of its own, at most once every `NOTE_SECONDS`."""
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        elif self.enabled and time.monotonic() - self.noted >= NOTE_SECONDS:
            self.noted = time.monotonic()
            amount, left = str(self.done), ""
            if self.total is not None:
                amount += f"/{self.total}"
                seconds = (self.noted - self.started) * (self.total - self.done) / max(1, self.done)
                left = f"about {datetime.timedelta(seconds=round(seconds))} left"
            told = ", ".join(part for part in (f"{amount} {self.unit}s", text, left) if part)
            print(f"{self.description}: {told}", file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()
        seconds = time.monotonic() - self.started
        if self.enabled and self.bar is None and kind is None and seconds > QUIET_SECONDS:
            print(f"{self.description}: {seconds:.1f} s", file=sys.stderr, flush=True)


def one_line(error: object) -> str:
    """A message made safe for the terminal, whatever a broken file put into it.

    It is one line of limited length, without control characters.
    """
    text = " ".join(str(error).split())
    shown = text if len(text) <= LONGEST_LINE else text[:LONGEST_LINE] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def _interactive() -> bool:
    return sys.stderr.isatty() or "ipykernel" in sys.modules
