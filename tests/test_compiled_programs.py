"""What keeps a folder of compiled programs good for the next run of the tests."""

import pytest

from tests.compiled_programs import take


def test_one_run_at_a_time_has_the_folder(tmp_path):
    lock = take(tmp_path / "kept")
    assert take(tmp_path / "kept") is None
    lock.release()
    again = take(tmp_path / "kept")
    assert again is not None
    again.release()


@pytest.mark.parametrize("kind", ["cache", "atime"])
def test_what_was_written_by_half_is_swept(kind, tmp_path):
    whole = {"jit_a-1-cache", "jit_a-1-atime"}
    for name in {*whole, f"jit_b-2-{kind}"}:
        (tmp_path / name).write_bytes(b"x")
    take(tmp_path).release()
    assert {path.name for path in tmp_path.iterdir() if path.name != ".run"} == whole
