"""Small pipelines of the whole family, opened once."""

import functools

import jax
import pytest

from tests.pipelines import small_family


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory):
    """Name of a model in tests/small_models.py -> its converted directory; not to be written to."""
    folder = tmp_path_factory.mktemp("family")
    return functools.cache(lambda name: small_family.write(name, folder / name))


@pytest.fixture(scope="session")
def family(family_folder):
    """Name of a kind of `small_family.KINDS` -> its pipeline on one device."""

    @functools.cache
    def pipeline(name):
        kind = small_family.KINDS[name]
        return small_family.open_pipeline(family_folder(kind.model), kind.pipeline)

    return pipeline


@pytest.fixture(scope="module")
def quickly_compiled():
    """Programs that are small and run a few times are compiled in a third of the time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
