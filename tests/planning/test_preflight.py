"""Before a run: joint steps on as many blocks as fit the devices, and a warning of too little memory for its plan."""

import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from loads import LLAMA, config_of

from spap_jax import checkpoint, memory
from spap_jax.errors import SpapWarning
from spap_jax.parallel import mesh
from spap_jax.planning.plan import Request
from spap_jax.planning.preflight import settings_here
from spap_jax.settings import PruneSettings

LARGE = Path(__file__).parents[1] / "configs" / "llama-3.1-8b.json"


def request_of(**settings) -> Request:
    config, weight_bytes = checkpoint.read_config(LARGE, "llama-3.1-8b")
    return Request(config, PruneSettings(**settings), 128, 2048, weight_bytes)


def test_a_large_model_on_a_small_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "of_machine", lambda: 60e9)
    with pytest.warns(SpapWarning) as found:
        settings_here(request_of(joint_blocks=0))
    [said] = [str(each.message) for each in found]
    assert said.startswith("a plan of this run needs 71.5 GB of each device in the phase 'joint steps', and a device ")
    assert "here has 60 GB. It would fit with --joint-blocks 16, or with --effort low" in said
    assert "in place of" not in said


@pytest.mark.parametrize(("gigabytes", "together"), [(60, 16), (80, None)])
def test_joint_steps_adjust_as_many_blocks_as_fit(
    gigabytes: int, together: int | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory, "of_machine", lambda: gigabytes * 1e9)
    assert settings_here(request_of()) == PruneSettings(joint_blocks=together)
    assert settings_here(request_of(joint_blocks=2)) == PruneSettings(joint_blocks=2)


def test_cpus_share_the_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "of_machine", lambda: 30e9)
    with mesh.use_mesh(4), pytest.warns(SpapWarning, match=r"a device here has 7\.5 GB"):
        settings_here(request_of(effort="low"))


def test_a_run_that_fits_or_cannot_be_planned_is_no_cause_for_a_warning(monkeypatch: pytest.MonkeyPatch):
    small = Request(config_of(LLAMA), PruneSettings(), 16, 64, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(memory, "of_machine", lambda: 80e9)
        settings_here(request_of())
        settings_here(small)
        monkeypatch.setattr(memory, "of_machine", lambda: 1)
        settings_here(request_of(allocation="global"))


@pytest.mark.parametrize(("in_use", "together"), [(0, None), (20e9, 16)])
def test_what_a_notebook_holds_is_not_free(in_use: float, together: int | None, monkeypatch: pytest.MonkeyPatch):
    stats = {"bytes_limit": 80e9, "bytes_in_use": in_use}
    gpu = SimpleNamespace(platform="gpu", device_kind="a GPU", memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    with (
        pytest.warns(SpapWarning, match="together would gain more, and need more than 60 GB. JAX takes")
        if together
        else nullcontext()
    ):
        assert settings_here(request_of()) == PruneSettings(joint_blocks=together)


@pytest.mark.parametrize(
    ("name", "said"),
    [(None, True), ("XLA_CLIENT_MEM_FRACTION", False), ("XLA_PYTHON_CLIENT_MEM_FRACTION", False)],
)
def test_a_gpu_may_give_more(name: str | None, said: bool, monkeypatch: pytest.MonkeyPatch):
    gpu = SimpleNamespace(platform="gpu", device_kind="a GPU", memory_stats=lambda: {"bytes_limit": 10e9})
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    if name:
        monkeypatch.setenv(name, "0.9")
    with pytest.warns(SpapWarning, match="a plan of this run needs") as found:
        settings_here(request_of())
    assert ("XLA_CLIENT_MEM_FRACTION=0.95" in str(found[0].message)) == said


def test_a_device_that_does_not_say_what_it_has(monkeypatch: pytest.MonkeyPatch):
    gpu = SimpleNamespace(platform="gpu", device_kind="a GPU", memory_stats=lambda: None)
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    with pytest.warns(SpapWarning, match="does not say how much memory"):
        assert settings_here(request_of()) == PruneSettings()
