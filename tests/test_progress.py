"""Progress where there is no terminal: lines that say how far the work is, and how long it will take."""

import re

from unclip_jax import progress
from unclip_jax.progress import Progress


def test_a_note_tells_amounts_and_what_is_left(monkeypatch, capsys):
    monkeypatch.setattr(progress, "NOTE_SECONDS", 0)
    with Progress("making images", None, unit="row") as bar:
        bar.update(3)
        bar.note("2 images a second")
        bar.expect(12)
        bar.started -= 60
        bar.note("")
    first, second = capsys.readouterr().err.splitlines()
    assert first == "making images: 3 rows, 2 images a second"
    assert re.fullmatch(r"making images: 3/12 rows, about 0:03:0\d left", second)
    with Progress("making images", None, unit="row", enabled=False) as bar:
        bar.note("nothing")
    assert not capsys.readouterr().err
