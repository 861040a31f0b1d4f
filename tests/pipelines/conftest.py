"""Small pipelines of the whole family, opened once."""

import functools

import pytest

from tests.pipelines import small_family


@pytest.fixture(scope="session")
def family(family_folder):
    """Name of a kind of `small_family.KINDS` -> its pipeline on one device."""

    @functools.cache
    def pipeline(name):
        kind = small_family.KINDS[name]
        return small_family.open_pipeline(family_folder(kind.model), kind.pipeline)

    return pipeline


@pytest.fixture(scope="session")
def opened(family_folder):
    """opened(devices, dtype=, memory=): the small unCLIP, opened anew."""
    return functools.partial(small_family.open_pipeline, family_folder("SMALL"), "UnCLIPPipeline", progress=False)
