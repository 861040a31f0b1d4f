"""The fuzzer's corpus replayed: every file in it is opened, or refused in one line, as scripts/fuzz demands."""

import pytest

from tests.fuzz.readers import CORPUS, READERS, outcome


@pytest.mark.parametrize("reader", READERS)
def test_every_file_of_the_corpus_is_read_or_refused_in_one_line(reader):
    files = sorted((CORPUS / reader).iterdir())
    said = {path.name: outcome(reader, path.read_bytes()) for path in files}
    assert "" in said.values(), "no file of the corpus is a good one"
    assert len(set(said.values())) > 1, "no file of the corpus is a broken one"
