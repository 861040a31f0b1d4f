"""The persistent compilation cache is the user's folder, or whatever the user configured, or off: never an error."""

import jax
import pytest

from unclip_jax.compilation import use_compilation_cache


@pytest.fixture
def unconfigured():
    """As in a process of a user who configured nothing."""
    configured = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", configured)


def test_programs_are_kept_in_the_users_folder(unconfigured, monkeypatch, tmp_path):
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    assert use_compilation_cache() == tmp_path / "unclip_jax" / "compiled"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "unclip_jax" / "compiled")
    assert list((tmp_path / "unclip_jax" / "compiled").iterdir()) == []


def test_what_the_user_configured_stays(unconfigured, monkeypatch, tmp_path):
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert use_compilation_cache() == tmp_path / "mine"
    assert not (tmp_path / "unclip_jax").exists()


def test_a_folder_that_cannot_be_made(unconfigured, monkeypatch, tmp_path):
    (tmp_path / "unclip_jax").write_text("a file where the folder would be")
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    assert use_compilation_cache() is None
    assert jax.config.jax_compilation_cache_dir is None


def test_a_full_disk_leaves_the_cache_off(unconfigured, monkeypatch, tmp_path):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    assert use_compilation_cache() is None
