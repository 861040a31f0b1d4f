"""Executables: found by what a call is, refused by name for what has changed, equal in what they make."""

import dataclasses
import functools
import subprocess
import sys

import jax
import numpy as np
import pytest

from unclip_jax import executables
from unclip_jax.distributed.mesh import batch_sharding, local_mesh, replicated
from unclip_jax.executables import Stored
from unclip_jax.pipelines.precompile import _compiled_anew
from unclip_jax.sampling import make_solver
from unclip_jax.sampling.guidance import Guidance

MESH = local_mesh(jax.local_devices()[:2])
OTHER_USER = b"of another"


@jax.jit(static_argnames="power")
def raised(weights, x, *, power):
    return {"y": (weights["w"] * x) ** power}


@pytest.fixture(autouse=True)
def user(monkeypatch, tmp_path):
    """A user without a secret yet."""
    monkeypatch.setattr("platformdirs.user_data_dir", lambda name: str(tmp_path / "data" / name))


@pytest.fixture(scope="module")
def compiled():
    with _compiled_anew():
        return raised.lower(*arrays(), power=3).compile()


def arrays(rows=2, dtype=np.float32):
    x = jax.device_put(np.arange(rows * 4, dtype=dtype).reshape(rows, 4), batch_sharding(MESH))
    return {"w": jax.device_put(np.float32([2]), replicated(MESH))}, x


def facts(**changes):
    return {**executables.make_facts(MESH, dtype="float32"), **changes}


def written(compiled, root):
    """A folder with one program, and the program's file."""
    folder = executables.write_facts(root, facts())
    return executables.write(folder, executables.call_name("raised", arrays(), {"power": 3}), compiled)


def stored(root, named=False):
    found = executables.find(root, facts(), MESH, named)
    assert found is not None
    return Stored("raised", raised, found)


class Refusing:
    """In the place of a jitted function: whoever calls it has compiled."""

    def __call__(self, *arrays, **static):
        raise AssertionError("compiled")


def test_a_stored_program_is_used_and_is_the_same(compiled, tmp_path):
    written(compiled, tmp_path)
    program = dataclasses.replace(stored(tmp_path), jitted=Refusing())
    for _ in range(2):
        made = program(*arrays(), power=3)["y"]
    np.testing.assert_array_equal(made, raised(*arrays(), power=3)["y"])
    assert made.sharding == compiled.output_shardings["y"]


@pytest.mark.parametrize(
    "call", [(arrays(4), 3), (arrays(2, np.int32), 3), (arrays(), 2), ((arrays()[0], np.asarray(arrays()[1])), 3)]
)
def test_other_calls_are_compiled(compiled, tmp_path, call):
    """Of another shape, dtype, static argument and placement."""
    written(compiled, tmp_path)
    given, power = call
    np.testing.assert_array_equal(stored(tmp_path)(*given, power=power)["y"], raised(*given, power=power)["y"])
    with pytest.raises(AssertionError, match="compiled"):
        dataclasses.replace(stored(tmp_path), jitted=Refusing())(*given, power=power)


def test_names_of_calls_hold_in_every_process():
    """Solvers are functions of modules; what is a process's own has no name."""
    solver = make_solver("dpm++2m", {}, 3)
    named = functools.partial(executables.call_name, "start", static={"guidance": Guidance()})
    code = (
        "from unclip_jax import executables; from unclip_jax.sampling import *; print(executables.call_name("
        "'start', (make_solver('dpm++2m', {}, 3),), {'guidance': Guidance()}))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert there == named((solver,))
    assert there != named((make_solver("ddim", {}, 3),))
    with pytest.raises(ValueError, match="not a module's own function"):
        named((dataclasses.replace(solver, init=lambda x: ()),))


@pytest.mark.parametrize(
    "name", ["jax", "code", "device", "mesh", "dtype", "XLA_FLAGS", "jax_default_matmul_precision"]
)
def test_other_facts_are_refused_by_name(compiled, tmp_path, name):
    written(compiled, tmp_path)
    now = facts(**{name: "another"})
    with pytest.raises(ValueError, match=f"are for {name} .*this process has 'another'.*unclip-jax compile"):
        executables.find(tmp_path, now, MESH, named=True)
    with pytest.warns(UserWarning, match=f"not used: those in .* are for {name}"):
        assert executables.find(tmp_path, now, MESH, named=False) is None


def test_facts_hold_what_programs_are_compiled_under(monkeypatch):
    before = facts()
    monkeypatch.setenv("XLA_FLAGS", "--xla_other")
    with jax.default_matmul_precision("highest"):
        changed = {name for name, fact in facts().items() if fact != before[name]}
    assert changed == {"XLA_FLAGS", "jax_default_matmul_precision"}


def test_a_folder_without_executables(tmp_path):
    assert executables.find(tmp_path / "none", facts(), MESH, named=False) is None
    with pytest.raises(ValueError, match="holds none"):
        executables.find(tmp_path / "none", facts(), MESH, named=True)


def truncated(file):
    file.write_bytes(file.read_bytes()[:-100])


def corrupted(file):
    content = bytearray(file.read_bytes())
    content[-10] ^= 1
    file.write_bytes(content)


def renamed(file):
    """Another program under this one's name."""
    other = file.with_name("other.executable")
    file.rename(other)
    folder = other.parent
    other.rename(folder / f"{executables.call_name('raised', arrays(4), {'power': 3})}.executable")


def foreign(file):
    file.write_bytes(b"\x80\x04.")


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    ("breaks", "says"), [(truncated, "SHA-256"), (corrupted, "SHA-256"), (renamed, "SHA-256"), (foreign, "not an exec")]
)
def test_broken_files_are_refused(compiled, tmp_path, breaks, says, named):
    breaks(written(compiled, tmp_path))
    given = arrays(4) if breaks is renamed else arrays()
    program = stored(tmp_path, named)
    if named:
        with pytest.raises(ValueError, match=says):
            program(*given, power=3)
        return
    with pytest.warns(UserWarning, match=says):
        made = program(*given, power=3)["y"]
    np.testing.assert_array_equal(made, raised(*given, power=3)["y"])


def test_files_of_others_are_trusted_when_they_are_named_alone(compiled, tmp_path, monkeypatch):
    """Nothing of them is unpickled before."""
    written(compiled, tmp_path)
    monkeypatch.setattr(executables, "_secret", lambda: OTHER_USER)
    loads = executables.pickle.loads
    monkeypatch.setattr(executables.pickle, "loads", lambda payload: pytest.fail("unpickled"))
    with pytest.warns(UserWarning, match="not written by this user on this machine"):
        stored(tmp_path)(*arrays(), power=3)
    monkeypatch.setattr(executables.pickle, "loads", loads)
    dataclasses.replace(stored(tmp_path, named=True), jitted=Refusing())(*arrays(), power=3)


def test_the_secret_is_the_users_alone(tmp_path):
    assert executables._secret() == executables._secret()
    file = tmp_path / "data" / "unclip_jax" / "secret"
    assert file.stat().st_mode & 0o777 == 0o600
    assert len(file.read_bytes()) == 32


def test_an_interrupted_write_leaves_no_file(compiled, tmp_path, monkeypatch):
    def interrupted(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr("unclip_jax.checkpoints.atomic.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        executables.write(tmp_path, "raised", compiled)
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]  # the user's
