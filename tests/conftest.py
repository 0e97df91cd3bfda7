"""Eight CPU devices, explicit broadcasting, warnings as errors (pyproject.toml)."""

import atexit
import gc
import importlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import environment  # noqa: F401  # isort: skip
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--old-python", default=sys.executable, help="Python whose transformers loads pruned checkpoints")
    parser.addoption("--llama-cpp-python", help="Python of .ci/llama_cpp, whose llama.cpp runs pruned checkpoints")
    parser.addoption("--tunix-python", help="Python of .ci/tunix, whose Tunix trains pruned checkpoints")


def pytest_configure(config: pytest.Config) -> None:
    """Let a worker end at once, which has told all results by then: to free what it holds takes Python ten seconds.

    The first process drops the programs that earlier runs kept, once they are a great many.
    """
    programs = config.cache.mkdir("programs")
    if hasattr(config, "workerinput"):
        atexit.register(os._exit, 0)
    elif sum(entry.stat().st_size for entry in programs.iterdir()) > _MOST_BYTES:
        shutil.rmtree(programs)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Collect the test of a client only if the option names a Python that has it, as none has it by default."""
    option = {"test_llama_cpp.py": "--llama-cpp-python", "test_tunix.py": "--tunix-python"}.get(collection_path.name)
    return (option is not None and not config.getoption(option)) or None


def pytest_collection_finish() -> None:
    """Make the garbage collector run less often, and spare it what has been imported.

    Tracing makes objects by the million, and nearly all of them are freed without it.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def pytest_sessionfinish() -> None:
    """Spare the garbage collector what has been made since, too: pytest collects several times at the end."""
    gc.collect()
    gc.freeze()


_MOST_BYTES = 2 * 10**9
"""Size of the programs of earlier runs above which they are dropped; one run keeps 80 MB."""

_MAPPINGS = Path("/proc/self/maps")
_MANY = 50_000
"""Memory mappings above which compiled programs are dropped.

Linux gives a process 65 530; every compiled program takes some, until the compiler gets none.
"""


@pytest.fixture(scope="session", autouse=True)
def _shared_programs(pytestconfig: pytest.Config) -> None:
    """Let all workers, the commands that tests start, and later runs share their compiled programs.

    They lie in pytest's own cache, which ``--cache-clear`` empties. An entry whose writer is not done, or was killed,
    is compiled again (JAX warns then, which pyproject.toml allows).
    """
    folder = str(pytestconfig.cache.mkdir("programs"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # commands compile the same small programs each time
    jax.config.update("jax_compilation_cache_dir", folder)


@pytest.fixture(scope="module", autouse=True)
def _room_for_programs() -> None:
    if _MAPPINGS.exists() and _MAPPINGS.read_bytes().count(b"\n") > _MANY:
        jax.clear_caches()


@pytest.fixture(scope="module")
def optimized() -> Iterator[None]:
    """Let programs be optimized, for tests that run them longer than it takes to compile them."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty store, whose addresses begin with frail://, and an empty cache of downloads in the test's folder."""
    import stores

    monkeypatch.setenv("SPAP_CACHE", str(tmp_path / "cache"))
    return stores.begin()


@pytest.fixture
def ask_hub(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """A function that lets this process, and those that it starts, ask the hub at an address, with empty caches."""
    from datasets import config
    from huggingface_hub import close_session, constants

    settings = {"HF_HOME": str(tmp_path / "hub"), "SPAP_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "*", "no_proxy": "*"}
    with pytest.MonkeyPatch.context() as patch:

        def ask(endpoint: str, token: str = "hf_secret") -> None:
            for name, value in {**settings, "HF_ENDPOINT": endpoint, "HF_TOKEN": token}.items():
                patch.setenv(name, value)
            for each in (constants, config):
                importlib.reload(each)  # which reads them

        close_session()
        yield ask
    for each in (constants, config):
        importlib.reload(each)
    close_session()


@pytest.fixture(scope="session", autouse=True)
def _eight_devices() -> None:
    assert jax.device_count() == 8
