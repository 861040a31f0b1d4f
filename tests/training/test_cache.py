"""What frozen networks say, kept: part by part, resumable, refused where it is of something else."""

import numpy as np
import pytest

from unclip_jax.training.cache import CachedExamples, write_cache

FACTS = {"model": "m", "resolution": 8}


def load(number):
    return None if number % 7 == 3 else {"x": np.full(3, number, np.float32)}


def encode(batch):
    assert len(batch["x"]) == 4  # compiled once
    return {"y": batch["x"] * 2, "z": batch["x"].sum(1)}


def test_rows_come_back_without_those_left_out(tmp_path):
    write_cache(tmp_path, range(20), load, encode, FACTS, batch_size=4, part_examples=6, progress=False)
    rows = CachedExamples(tmp_path)
    kept = [n for n in range(20) if n % 7 != 3]
    assert len(rows) == len(kept)
    for row, number in zip(rows, kept, strict=True):
        np.testing.assert_array_equal(row["y"], np.full(3, 2 * number))
        assert row["z"] == 3 * number
    np.testing.assert_array_equal(rows[-1]["y"], np.full(3, 38))


def test_an_interrupted_cache_goes_on(tmp_path):
    seen = []

    def stop(batch):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(batch["x"][0, 0])
        return encode(batch)

    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path, range(20), load, stop, FACTS, batch_size=4, part_examples=6, progress=False)
    with pytest.raises(ValueError, match="a broken part of a cache"):
        CachedExamples(tmp_path)
    done = sorted(path.name for path in tmp_path.glob("part*"))
    assert done == ["part-00000.safetensors"]
    stamp = (tmp_path / done[0]).stat().st_mtime_ns
    write_cache(tmp_path, range(20), load, encode, FACTS, batch_size=4, part_examples=6, progress=False)
    assert len(CachedExamples(tmp_path)) == 17
    assert (tmp_path / done[0]).stat().st_mtime_ns == stamp
    write_cache(tmp_path, range(20), load, lambda batch: pytest.fail("again"), FACTS, part_examples=6, progress=False)


@pytest.mark.parametrize("change", [{"model": "other"}, {"resolution": 16}])
def test_a_cache_of_something_else_is_refused(change, tmp_path):
    write_cache(tmp_path, range(4), load, encode, FACTS, batch_size=4, progress=False)
    with pytest.raises(ValueError, match=f"another cache \\({next(iter(change))} differ"):
        write_cache(tmp_path, range(4), load, encode, {**FACTS, **change}, batch_size=4, progress=False)


def test_a_part_of_which_nothing_was_read_is_empty(tmp_path):
    write_cache(tmp_path, [3, 10, 1, 2], load, encode, FACTS, batch_size=4, part_examples=2, progress=False)
    assert [row["z"] for row in CachedExamples(tmp_path)] == [3, 6]
