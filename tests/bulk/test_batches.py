"""Which rows share a batch, without networks: it follows from the rows of a part, in their order."""

import itertools
import time
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from unclip_jax.bulk.batches import WAITING, Asked, Begun, Part, batches, parts
from unclip_jax.bulk.rows import Row

IMAGES = 3


def asking(row):
    """By the row's letter: of one kind, or refused."""
    letter = row.values["letter"]
    if letter == "x":
        return Asked(row, reason="bad")
    return Asked(row, SimpleNamespace(batch=row.values["images"]), company=letter)


def rows_of(letters, images=1):
    return [Row(i, {"letter": letter, "images": images}, {}) for i, letter in enumerate(letters)]


def made(begun, images=IMAGES):
    return list(batches(begun, asking, images, 2))


def facts(batch):
    numbers = [one.row.number for one in batch.asked], [one.row.number for one in batch.refused]
    return batch.part.number, batch.number, batch.last, *numbers


@given(st.text("abcx", max_size=30), st.integers(1, 8))
def test_every_row_is_in_one_batch_with_its_own_kind(letters, size):
    found = made([Begun(part) for part in parts(rows_of(letters), size)])
    seen = sorted(one.row.number for batch in found for one in (*batch.asked, *batch.refused))
    assert seen == list(range(len(letters)))
    for batch in found:
        assert len({one.company for one in batch.asked}) <= 1
        assert len(batch.asked) <= IMAGES
    for number, of_part in itertools.groupby(found, lambda batch: batch.part.number):
        group = list(of_part)
        assert [batch.number for batch in group] == list(range(len(group)))
        assert [batch.last for batch in group] == [False] * (len(group) - 1) + [True]
        # As few as there can be, where nothing waits too long.
        kinds = [letters[one.row.number] for batch in group for one in batch.asked]
        assert sum(bool(batch.asked) for batch in group) == sum(-(-kinds.count(k) // IMAGES) for k in set(kinds))
        assert number < len(letters) / size


@given(st.text("abcdefghijklmnopqrstx", max_size=60), st.data())
def test_a_part_that_goes_on_makes_the_batches_that_are_left(letters, data):
    """Whatever the number of batches that were recorded before, with the refusals that they report."""
    part = Part(0, rows_of(letters))
    whole = made([Begun(part)])
    done = data.draw(st.integers(0, len(whole) - 1))
    recorded = {one.row.number for batch in whole[:done] for one in (*batch.asked, *batch.refused)}
    rest = made([Begun(part, recorded, done)])
    assert [facts(batch) for batch in rest] == [facts(batch) for batch in whole[done:]]


def test_rows_that_find_no_company_do_not_wait_for_ever():
    alone = [chr(0x4E00 + i) for i in range(WAITING * IMAGES + 5)]
    found = made([Begun(Part(0, rows_of(alone)))])
    assert [one.row.number for batch in found for one in batch.asked] == list(range(len(alone)))
    waiting = 0
    for batch in found[:5]:
        waiting = batch.asked[0].row.number
        assert not batch.last
    assert waiting == 4


def test_rows_of_several_images_fill_a_batch_or_are_one():
    assert [len(batch.asked) for batch in made([Begun(Part(0, rows_of("aaaaa", images=2)))], images=4)] == [2, 2, 1]
    assert [len(batch.asked) for batch in made([Begun(Part(0, rows_of("aa", images=5)))], images=4)][:2] == [1, 1]


def test_rows_are_read_a_few_batches_ahead_and_no_more():
    read = []

    def counting(row):
        read.append(row.number)
        return asking(row)

    coming = batches([Begun(Part(0, rows_of("a" * 500)))], counting, IMAGES, 2)
    next(coming)
    time.sleep(0.05)
    assert len(read) < 20
    coming.close()
