"""Eight CPU devices, explicit broadcasting, warnings as errors (pyproject.toml)."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# For the commands that tests start, which compile the same programs.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="spap-programs-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["PJRT_NPROC"] = "8"  # batched factorisations on CPU deadlock when they fill the pool of a small machine
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the network fails at once instead of after 46 seconds
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import spap_jax.numerics  # noqa: I001  (BLAS threads are set before anything loads BLAS)
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--old-python", default=sys.executable, help="Python whose transformers loads pruned checkpoints")


_MAPPINGS = Path("/proc/self/maps")
_MANY = 20_000
"""Of 65 530 mappings that Linux gives a process; every compiled program takes some, until the compiler gets none."""


@pytest.fixture(scope="module", autouse=True)
def _room_for_programs() -> Iterator[None]:
    yield
    if _MAPPINGS.exists() and _MAPPINGS.read_bytes().count(b"\n") > _MANY:
        jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def _eight_devices() -> None:
    assert jax.device_count() == 8
    assert spap_jax.numerics.full_precision is not None
