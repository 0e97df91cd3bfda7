"""The effort of the compiler follows the platform, and a user's own choice."""

import jax
import pytest

from spap_jax.backend import quick_compilation, traced_for

EFFORT = "jax_exec_time_optimization_effort"


def inside(platform: str) -> float:
    with traced_for(platform), quick_compilation():
        return getattr(jax.config, EFFORT)


def test_a_tpu_compiles_quickly():
    assert inside("tpu") == -1
    assert getattr(jax.config, EFFORT) == 0


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_others_compile_as_ever(platform: str):
    assert inside(platform) == 0


def test_what_a_user_chose_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(EFFORT.upper(), "0.5")  # what JAX read when it was imported
    assert inside("tpu") == 0
