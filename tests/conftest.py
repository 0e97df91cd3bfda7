"""Eight CPU devices, explicit broadcasting, warnings as errors (pyproject.toml)."""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["PJRT_NPROC"] = "8"  # batched factorisations on CPU deadlock when they fill the pool of a small machine
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the network fails at once instead of after 46 seconds
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import spap_jax.numerics  # noqa: I001  (BLAS threads are set before anything loads BLAS)
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--old-python", default=sys.executable, help="Python whose transformers loads pruned checkpoints")


@pytest.fixture(scope="session", autouse=True)
def _eight_devices() -> None:
    assert jax.device_count() == 8
    assert spap_jax.numerics.full_precision is not None
