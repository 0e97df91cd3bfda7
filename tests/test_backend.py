"""The effort of the compiler follows the platform, and a user's own choice; the memory that devices had taken."""

from typing import Any, NamedTuple

import jax
import pytest

from spap_jax.backend import peak_of_a_device, quick_compilation, traced_for
from spap_jax.parallel.mesh import use_mesh

EFFORT = "jax_exec_time_optimization_effort"


def inside(platform: str) -> float:
    with traced_for(platform), quick_compilation():
        return getattr(jax.config, EFFORT)


def test_a_tpu_compiles_quickly():
    assert inside("tpu") == -1
    assert getattr(jax.config, EFFORT) == 0


def test_only_pruning_compiles_quickly():
    """Speed is measured in a mesh, and long programs run in one."""
    with traced_for("tpu"), use_mesh(1):
        assert getattr(jax.config, EFFORT) == 0


def test_others_compile_as_ever():
    assert inside("cuda") == 0


def test_what_a_user_chose_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(EFFORT.upper(), "0.5")  # what JAX read when it was imported
    assert inside("tpu") == 0
    monkeypatch.delenv(EFFORT.upper())
    jax.config.update(EFFORT, 0.5)
    try:
        assert inside("tpu") == getattr(jax.config, EFFORT) == 0.5
    finally:
        jax.config.update(EFFORT, 0.0)


class Device(NamedTuple):
    platform: str
    said: dict[str, Any] | None

    def memory_stats(self) -> dict[str, Any] | None:
        return self.said


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ([Device("gpu", {"peak_bytes_in_use": 5}), Device("gpu", {"peak_bytes_in_use": 7})], 7),
        ([Device("tpu", None)], None),
        ([Device("cpu", {"peak_bytes_in_use": 5})], None),  # which is the memory of the process
    ],
)
def test_the_peak_memory_of_a_device(devices: list[Device], expected: int | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert peak_of_a_device() == expected
