"""Devices that are not there."""

import math
import sys

import pytest

from spap_jax.errors import UserError
from spap_jax.planning import absent
from spap_jax.planning.accelerators import ACCELERATORS, mesh_named


@pytest.mark.parametrize(
    ("version", "chips", "shape", "host"),
    [
        ("v5e", 1, (1, 1), (1, 1, 1)),
        ("v5e", 8, (2, 4), (2, 4, 1)),
        ("v5e", 16, (4, 4), (2, 2, 1)),
        ("v6e", 4, (2, 2), (2, 2, 1)),
        ("v6e", 128, (8, 16), (2, 2, 1)),
        ("v5p", 32, (2, 4, 4), (2, 2, 1)),
        ("v5p", 64, (4, 4, 4), (2, 2, 1)),
        ("v5p", 768, (8, 8, 12), (2, 2, 1)),
    ],
)
def test_shapes_of_slices_and_hosts(version: str, chips: int, shape: tuple[int, ...], host: tuple[int, ...]):
    assert absent.shape_of(version, chips) == shape
    assert absent.host_of(version, shape) == host


def test_every_mesh_is_described():
    for kind, accelerator in ACCELERATORS.items():
        if accelerator.platform == "gpu":
            assert f"device_memory_size: {int(accelerator.memory)}" in absent.target_of(accelerator)
            continue
        for chips in accelerator.sizes:
            assert math.prod(absent.shape_of(kind, chips)) == chips
            assert mesh_named(f"{kind}-{chips * accelerator.named}").devices == chips


@pytest.mark.parametrize(("name", "extra"), [("h100x8", r"\[cuda\]"), ("v5e-8", r"\[tpu\]")])
def test_meshes_without_a_compiler(name: str, extra: str, monkeypatch: pytest.MonkeyPatch):
    for package in ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(UserError, match=extra), absent.use_absent_mesh(mesh_named(name)):
        pass
