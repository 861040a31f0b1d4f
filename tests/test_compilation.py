"""The persistent compilation cache is the user's folder, or whatever the user configured, or off: never an error."""

import json
import os
import subprocess
import sys

import jax
import pytest

from unclip_jax.compilation import MAX_BYTES, use_compilation_cache


@pytest.fixture
def unconfigured():
    """As in a process of a user who configured nothing."""
    names = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    configured = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in configured.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_the_users_folder(unconfigured, monkeypatch, tmp_path):
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    assert use_compilation_cache() == tmp_path / "unclip_jax" / "compiled"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "unclip_jax" / "compiled")
    assert list((tmp_path / "unclip_jax" / "compiled").iterdir()) == []


def test_the_folder_is_bounded(unconfigured, monkeypatch, tmp_path):
    """Also one with programs that an interrupted process, or an earlier version, left without their time of use."""
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    folder = tmp_path / "unclip_jax" / "compiled"
    folder.mkdir(parents=True)
    (folder / "unfinished-cache").write_bytes(b"1")
    (folder / "finished-cache").write_bytes(b"2")
    (folder / "finished-atime").write_bytes(b"3")
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_max_size == MAX_BYTES
    assert sorted(file.name for file in folder.iterdir()) == ["finished-atime", "finished-cache"]


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


RUN = """
import collections, json, sys
import jax
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rsplit("/", 1)[1]]))
import unclip_jax
pipe = unclip_jax.UnCLIPPipeline.from_pretrained(sys.argv[1], "float32")
assert pipe.mesh.size == 4
pipe.progress = False
call = {"prompt": "a cat", "num_images_per_prompt": 4, "num_inference_steps": 2, "height": 128, "width": 128}
pipe(image=sys.argv[2], **call)
print(json.dumps(events))
"""


@pytest.mark.e2e
def test_another_process_compiles_nothing_on_several_devices(small_model, tmp_path):
    """With attention that each device computes for its own images: 1024 tokens are more than the plain form takes."""
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "XDG_CACHE_HOME": str(tmp_path)}
    picture = "unclip_jax/demo/pictures/red-apple.png"
    counts = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(small_model), picture],
            env={**os.environ, **devices},
            capture_output=True,
            text=True,
            check=True,
        )
        counts.append(json.loads(done.stdout.splitlines()[-1]))
    assert counts[0].get("cache_misses", 0) > 5
    assert counts[1].get("cache_misses", 0) == 0
    assert counts[1]["cache_hits"] > 5
