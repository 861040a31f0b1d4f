"""The host's memory, by the system's account and its container's."""

import pytest

from unclip_jax import host_memory
from unclip_jax.host_memory import available_memory


def test_it_is_less_than_the_machine_has():
    with open("/proc/meminfo") as lines:
        total = 1024 * int(next(line for line in lines if line.startswith("MemTotal")).split()[1])
    assert 0 < available_memory() < total


@pytest.mark.parametrize(
    ("limit", "left"),
    [("1000", 400), ("500", 0)],  # more is used than the limit: the last bytes are being taken back
)
def test_a_container_may_leave_less(tmp_path, monkeypatch, limit, left):
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("600\n")
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    assert available_memory() == left


def test_a_container_without_a_limit_leaves_the_machines(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    assert available_memory() > 2**20
