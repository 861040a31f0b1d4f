"""Networks without weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.random import SMALL
from unclip_jax.checkpoints.networks import NETWORKS, Structure, abstract_network, network_class

CONFIGS = {
    f"{kind} {name}": (cls, part)
    for kind, config in SMALL.items()
    for name, cls in NETWORKS.items()
    if (part := getattr(config, name, None)) is not None
}
KINDS = {f"{cls} {part}": (cls, part) for cls, part in CONFIGS.values()}.values()


@pytest.mark.e2e
@pytest.mark.parametrize(("cls", "config"), KINDS, ids=[cls.partition(":")[2] for cls, _ in KINDS])
def test_a_network_without_weights_is_one_with_weights_but_for_them(cls, config):
    abstract = abstract_network(cls, config, jnp.float32)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: network_class(cls)(config, rngs=nnx.Rngs(0))))
    made = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    assert abstract.graphdef.graphdef == graphdef
    assert {name: (spec.shape, spec.dtype) for name, spec in abstract.params.items()} == {
        name: (variable.shape, variable.dtype) for name, variable in made.items()
    }


@pytest.mark.parametrize(("cls", "config"), KINDS, ids=[cls.partition(":")[2] for cls, _ in KINDS])
def test_a_network_without_weights_traces_no_random_numbers(cls, config, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("random numbers are drawn, and nothing reads them")

    for draw in ("normal", "truncated_normal"):  # of which the initialisers make everything
        monkeypatch.setattr(f"jax._src.random.{draw}", refuse)
    assert Structure(cls, config, np.dtype("float32"), np.dtype("float32")).graphdef


@pytest.fixture
def cache_folder(tmp_path):
    configured = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", configured)


@pytest.mark.parametrize("breaks", [None, lambda file: file.write_text("{"), lambda file: file.write_text("[1]")])
def test_shapes_are_kept_in_a_file(monkeypatch, cache_folder, breaks):
    """Read without building a network, and made again where the file is broken."""
    cls, config = next(iter(KINDS))
    options = cls, config, jnp.bfloat16, jnp.float32
    want = Structure(*options).shapes
    (file,) = cache_folder.glob("shapes/*")
    if breaks is None:
        monkeypatch.setattr(Structure, "_split", property(lambda self: pytest.fail("built")))
    else:
        breaks(file)
    assert Structure(*options).shapes == want
