"""What bulk jobs are made of, in one process and on a cluster."""

import pytest

from tests.bulk.jobs import write_rows
from tests.pipelines.small_family import open_pipeline


@pytest.fixture(scope="module")
def pipe(family_folder):
    return open_pipeline(family_folder("SMALL"), "UnCLIPPipeline", progress=False)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The input of `tests.bulk.jobs`."""
    return write_rows(tmp_path_factory.mktemp("rows"))
